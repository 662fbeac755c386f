"""Train, evaluate or generate: `python examples/run_xlm.py --config-name ilm_star`; see the README for the rest."""

from xlm_hf_cli import main

if __name__ == "__main__":
    main()
