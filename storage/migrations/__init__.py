"""The schema's history: every change of tables.py is one revision here."""
