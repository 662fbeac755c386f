"""Share of texts that are one of several answers."""
