"""What persona keeps: one SQLite file and a folder of adapter files, behind a few nouns."""
