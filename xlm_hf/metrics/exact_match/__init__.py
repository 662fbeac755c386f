"""Share of predictions that equal their reference."""
