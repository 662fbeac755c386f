"""Validity, uniqueness, novelty, properties and diversity of molecules."""
