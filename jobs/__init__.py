"""Learning: from a user's history to a new version of their adapter, checked before it serves."""
