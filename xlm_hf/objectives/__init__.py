"""What collators and losses share and no exported model needs: collation, the head operator, the output of a loss."""
