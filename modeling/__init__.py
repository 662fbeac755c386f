"""The model families, one folder each; a folder's `__init__` registers its family."""
