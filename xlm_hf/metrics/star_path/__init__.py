"""Share of predictions that are a path from source to goal of their star graph."""
