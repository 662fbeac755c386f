"""What goes to the Hub and what comes from there: exports, cards, uploads, checkpoints of other projects."""
