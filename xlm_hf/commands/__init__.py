"""The jobs of the command line, one file each: a module `NAME` holds the function `run(cfg)` of `job=NAME`.

What they share is in `_run`.
"""
