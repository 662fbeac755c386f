"""Entropy of the tokens within a sample."""
