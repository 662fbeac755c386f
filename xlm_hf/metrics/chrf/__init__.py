"""chrF against one or several references."""
