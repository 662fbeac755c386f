"""The configs that Hydra composes. Here the published recipes get their names, `paper/<family>_<task>`."""

from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


def _store_recipes(folder: Path) -> None:
    """Store a recipe for each task that a file of `families/` names.

    It lays over each other what all recipes share, what its task needs, what its family needs (`all`), and what is of
    both.
    """
    shared, tasks = (yaml.safe_load((folder / name).read_text()) for name in ("_base.yaml", "_tasks.yaml"))
    for file in sorted((folder / "families").glob("*.yaml")):
        recipes, family = yaml.safe_load(file.read_text()), file.stem
        of_family = recipes.pop("all", {})
        for task, options in recipes.items():
            choices = {"size": "base", "family": family, "task": task}
            overrides = [{f"override /{group}": choice} for group, choice in choices.items()]
            defaults = {"defaults": ["/config", *overrides, "_self_"]}
            recipe = OmegaConf.merge(defaults, shared, tasks[task], of_family, options)
            ConfigStore.instance().store(f"{family}_{task}", recipe, group=folder.name, package="_global_")


_store_recipes(Path(__file__).parent / "paper")
