"""Share of n-grams that differ, within samples and across them."""
