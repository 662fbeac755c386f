"""Hydra configuration of xlm-hf: thin named experiments over groups, read as `pkg://xlm_hf.configs`."""
