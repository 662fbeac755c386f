"""Training: the trainer, its arguments and callbacks, checkpoints, averages and optimisers."""
