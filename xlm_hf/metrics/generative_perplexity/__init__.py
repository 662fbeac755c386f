"""Perplexity of samples under another language model, beside their entropy."""
