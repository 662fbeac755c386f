"""BLEU against one or several references."""
