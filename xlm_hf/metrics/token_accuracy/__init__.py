"""Share of reference tokens that the predictions have in place."""
