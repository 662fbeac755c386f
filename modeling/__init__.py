"""The model families, one folder each; a folder's `__init__` registers its family."""

# The family that `xlm-hf scaffold` copies unless told otherwise: the shortest that is not autoregressive.
STARTING_POINT = "mlm"
