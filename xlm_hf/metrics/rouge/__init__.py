"""ROUGE against one or several references."""
