"""Divergence between generated and human text."""
