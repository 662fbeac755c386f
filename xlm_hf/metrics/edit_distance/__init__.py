"""Edit distances of predictions, and of what they correct, to their references."""
