"""`xlm-hf scaffold NAME`: a family of your own, as an installable package that trains and passes the suite as it is."""

import argparse
import importlib
import inspect
import keyword
import re
from importlib import resources
from pathlib import Path

from xlm_hf.commands._run import say
from xlm_hf.families import families
from xlm_hf.files import replaced_folder
from xlm_hf.modules.messages import did_you_mean


def main(arguments: list[str]) -> None:
    """Write the package.

    Args:
        arguments: of the command line, after `scaffold`.

    Raises:
        ValueError: if the name is not an identifier in lower case, is taken, or the folder exists.
    """
    default = importlib.import_module("xlm_hf.modeling").STARTING_POINT
    parser = argparse.ArgumentParser("xlm-hf scaffold", description=__doc__)
    parser.add_argument("name", help="of the family: a Python name in lower case, like my_model")
    parser.add_argument("--from", dest="source", default=default, help=f"the family to start from ({default})")
    parser.add_argument("--output", type=Path, help="the folder to write (./NAME)")
    options = parser.parse_args(arguments)
    name, source = options.name, options.source
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ValueError(f"The name of a family is a Python name in lower case, like my_model, and not {name!r}.")
    shipped = [family for family in families() if "xlm_hf.modeling" in families()[family].config_class.__module__]
    if source not in shipped:
        raise ValueError(f"There is no family {source!r} to start from: {did_you_mean(source, shipped)}")
    if name in families() or importlib.util.find_spec(name) is not None:
        raise ValueError(f"There is a family or a package {name!r} already: choose another name.")
    folder = options.output or Path(name)
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another folder with --output.")
    with replaced_folder(folder.absolute()) as staging:
        _write_package(staging, name, source)
    say(f"{folder} is an installable package with a family {name!r}, a copy of {source!r} for you to change. Next:")
    say(f"  pip install -e {folder}[test] && xlm-hf --config-name {name}_star size=tiny && pytest {folder}")


def _write_package(folder: Path, name: str, source: str) -> None:
    title = "".join(part.capitalize() for part in name.split("_"))
    words = {"NAME": name, "TITLE": title, "PROJECT": name.replace("_", "-"), "SOURCE": source}

    def filled(text: str) -> str:
        return re.sub("|".join(words), lambda match: words[match[0]], text)

    template = Path(str(resources.files("xlm_hf") / "scaffold"))
    for file in template.rglob("*.template"):
        target = folder / filled(str(file.relative_to(template)).removesuffix(".template"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(filled(file.read_text()))
    package, shipped = folder / name, template.parent
    # Nobody has published checkpoints of a family that is only now begun.
    code = Path(inspect.getfile(families()[source].config_class)).parent
    files = [file for file in code.glob("*.py") if not file.name.startswith("conversion_")]
    copies = {file: _renamed(file.name, source, name, title) for file in files}
    copies[shipped / "configs" / "family" / f"{source}.yaml"] = f"configs/family/{name}.yaml"
    copies[shipped / "configs" / f"{source}_star.yaml"] = f"configs/{name}_star.yaml"
    copies[shipped / "hub_cards" / f"{source}.md"] = "hub_card.md"
    (package / "configs" / "family").mkdir()
    for original, copy in copies.items():
        (package / copy).write_text(_renamed(original.read_text(), source, name, title))


def _renamed(text: str, source: str, name: str, title: str) -> str:
    """Replace the family's name in code (`collator_f`, `FConfig`, `xlm_hf.modeling.f`) and words by the new one."""
    text = re.sub(r"(?m)^from \.conversion_.*\n", "", text)
    text = re.sub(r",\s*converters=\{[^}]*\}", "", text)
    text = re.sub(rf"(?<![a-z])(xlm_hf\.modeling\.)?{source}(?![a-z])", name, text)
    return re.sub(rf"(?<![A-Za-z]){source.upper()}(?![a-z])", title, text)
