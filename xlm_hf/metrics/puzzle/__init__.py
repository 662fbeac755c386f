"""What the checker of a puzzle says of answers."""
