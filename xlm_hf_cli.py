"""`xlm-hf`: its help and its version at once, and everything else by the library, which takes seconds to import.

It stands outside of the package, since to import anything of a package is to import the package.
"""

import ast
import importlib.util
import sys
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

_TOOLS = ("scaffold", "convert")
_GROUPS = ("family", "task", "size", "logger", "debug")
_USAGE = """xlm-hf: train, evaluate and share non-autoregressive language models

  xlm-hf JOB [RUN] [--config-name NAME] [option=value ...]

Jobs (train by default):
{jobs}
Tools:
{tools}
Examples:
  xlm-hf --config-name ilm_star                          train a named experiment
  xlm-hf family=mdlm task=text task.path=corpus.txt      any family on any task
  xlm-hf --config-name ilm_star output_dir=runs/a        the same command again resumes
  xlm-hf evaluate runs/a                                 a run knows its own config
  xlm-hf generate runs/a prompts=prompts.jsonl
  xlm-hf --config-name ilm_star --cfg job                show the config of a run

xlm-hf JOB --help says more. eval "$(xlm-hf -sc install=bash)" completes options in this shell.
"""


def _package() -> Path:
    spec = importlib.util.find_spec("xlm_hf")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _docstring(file: Path, function: str | None = None) -> str:
    """The docstring of a module, or of a function in it, without importing it."""
    module = ast.parse(file.read_text())
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return ast.get_docstring(functions[0] if functions else module) or ""


def jobs() -> dict[str, str]:
    """What `job=` takes, with a line on each; the tools with arguments of their own are among them."""
    files = sorted((_package() / "commands").glob("[!_]*.py"))
    lines = {file.stem: _docstring(file).splitlines()[0] for file in files}
    return {name: line.split(":", 1)[1].strip() if ":" in line else line for name, line in lines.items()}


def _overview() -> str:
    known = jobs()
    width = max(map(len, known)) + 2
    rows = {name: f"  {name:<{width}}{line}\n" for name, line in known.items()}
    return _USAGE.format(
        jobs="".join(row for name, row in rows.items() if name not in _TOOLS),
        tools="".join(rows[name] for name in _TOOLS),
    )


def _text(node: ast.expr) -> str:
    """A string in the source, with dots for what only running it would tell."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)


def _help_on(job: str) -> str:
    file = _package() / "commands" / f"{job}.py"
    if job in _TOOLS:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
        lines = [f"xlm-hf {job}: {jobs()[job]}", ""]
        for call in added:
            said = "".join(_text(keyword.value) for keyword in call.keywords if keyword.arg == "help")
            lines.append(f"  {_text(call.args[0]):<12}{said}")
        return "\n".join(lines) + "\n"
    configs = _package() / "configs"
    names = sorted(file.stem for file in configs.glob("*.yaml") if file.stem != "config")
    recipes = [
        f"{file.stem}_{line.split(':')[0]}"
        for file in sorted((configs / "paper" / "families").glob("*.yaml"))
        for line in file.read_text().splitlines()
        if line[:1].isalpha() and not line.startswith("all:")
    ]
    groups = {group: sorted(file.stem for file in (configs / group).glob("[!_]*.yaml")) for group in _GROUPS}
    text = (configs / "config.yaml").read_text().split("\njob:")[1].split("\nhydra:")[0]
    options = [line for line in f"job:{text}".splitlines() if "#" in line]
    return "\n".join(
        [
            f"xlm-hf {job}: {jobs()[job]}\n\n{_docstring(file, 'run')}\n",
            *(f"{group}=  {', '.join(found)}" for group, found in groups.items()),
            f"--config-name  {', '.join(names)}",
            f"--config-name paper/...  {', '.join(recipes)}\n",
            *options,
            "",
        ]
    )


def arguments(given: list[str]) -> list[str]:
    """A command line in the terms of the configs: `evaluate RUN` is `job=evaluate checkpoint=RUN`."""
    if given[0] in _TOOLS or "=" in given[0] or given[0].startswith("-"):
        return given
    job, rest = given[0], given[1:]
    if job not in jobs():
        close = get_close_matches(job, jobs(), 1)
        remedy = f"did you mean {close[0]!r}?" if close else "see xlm-hf --help."
        print(f"Error: There is no job {job!r}: {remedy}", file=sys.stderr)
        sys.exit(2)
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rest[0] = f"checkpoint={rest[0]}"
    return [f"job={job}", *rest]


def main() -> None:
    """Run the command line."""
    given = sys.argv[1:]
    if given in ([], ["help"]) or given[0] in ("--help", "-h"):
        print(_overview(), end="")
    elif given[0] == "--version":
        print(f"xlm-hf {version('xlm-hf')}")
    elif given[0] in jobs() and {"--help", "-h"} & set(given):
        print(_help_on(given[0]), end="")
    else:
        from xlm_hf.cli import main as run

        sys.argv[1:] = arguments(given)
        run()
