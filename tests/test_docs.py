"""What the README and the pages of the documentation say is what happens.

The blocks of a page run in their order, in one folder and one Python namespace: Python as written, commands of the
library with the smallest sizes in place of the page's. A block with a title is a file of that name; one under
`<!-- not run: WHY -->` is left out.
"""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from xlm_hf.building import compose
from xlm_hf_cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "modeling").glob("*/README.md"))]
# It installs packages of its own, which only a new process finds.
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^(<!-- not run: .+? -->\n)?```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALLEST = {
    "size": "tiny",
    "trainer.max_steps": "2",
    "trainer.per_device_train_batch_size": "4",
    "trainer.eval_steps": "2",
    "trainer.save_steps": "2",
}
FEW_GRAPHS = {"task.num_train": "40", "task.num_validation": "4", "task.num_test": "8"}


def blocks(page):
    return [match.groups() for match in BLOCK.finditer(page.read_text())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page's blocks run: the entry point, and a small corpus."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "corpus.txt").write_text("".join(f"line {i} says {i % 7} and {i % 5}\n" for i in range(200)))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 2 2 3 1 3"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_command(line, monkeypatch):
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if word.endswith(("run_xlm.py", "xlm-hf")))
    program, arguments = words[start], words[start + 1 :]
    # A word is a tool, or a job on a run that was made with the smallest sizes.
    if not any(argument.startswith("--cfg") for argument in arguments) and not arguments[0].isidentifier():
        arguments = with_smallest_sizes(arguments)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    main()


def with_smallest_sizes(arguments):
    name = arguments[arguments.index("--config-name") + 1] if "--config-name" in arguments else "config"
    cfg = compose(name, [a for a in arguments if "=" in a and not a.startswith(("-", "~"))])
    wanted = {**SMALLEST, **(FEW_GRAPHS if "num_train" in cfg.task else {})}
    return [a for a in arguments if a.split("=")[0] not in wanted] + [f"{key}={value}" for key, value in wanted.items()]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != TUTORIAL and blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_blocks_of_a_page_run(page, folder, monkeypatch):
    namespace = {}
    for not_run, language, title, text in blocks(page):
        if title is not None:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(text)
        elif not_run is not None:
            continue
        elif language == "python":
            exec(compile(text, str(page), "exec"), namespace)
        elif language == "bash":
            for line in filter(None, text.replace("\\\n", " ").splitlines()):
                assert "run_xlm.py" in line or "xlm-hf" in line, f"{page.name}: {line!r}: say why it is not run"
                run_command(line, monkeypatch)
        else:
            assert language in ("text", "yaml", "json", "toml", "math"), f"{page.name}: {language}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_it_names_exist(page):
    for path in re.findall(r"`((?:configs|xlm_hf|modeling|docs|examples|benchmarks)/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("family", ["mlm", "insertion_transformer", "levenshtein_transformer"])
def test_a_card_says_where_published_quality_leaned_on_distillation(family):
    for card in (ROOT / "hub_cards" / f"{family}.md", ROOT / "modeling" / family / "README.md"):
        assert "distillation" in card.read_text()


def test_ci_runs_the_test_command_of_the_readme():
    section = (ROOT / "README.md").read_text().split("## Tests")[1].split("\n## ")[0]
    command = 'pip install -c constraints.txt -e ".[test]" && python -m pytest -n 2 --dist loadfile'
    assert re.search(r"```bash\n(.*?)\n```", section)[1] == command
    assert "## Tests" in (ROOT / ".ci" / "run").read_text()


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site" / "reference" / "training" / "index.html").read_text()
    assert 'id="xlm_hf.training.trainer.XLMTrainer.compute_loss"' in reference
    family = (tmp_path / "site" / "families" / "mdlm" / "index.html").read_text()
    assert family.count('<div class="arithmatex">') == 1
    assert '<span class="arithmatex">\\(\\alpha\\)</span>' in family
    assert '<a href="https://arxiv.org/abs/2406.07524">arXiv 2406.07524</a>' in family
    # Nothing that a page loads is elsewhere.
    pages = [page.read_text() for page in (tmp_path / "site").rglob("*.html")]
    loaded = [found for page in pages for found in re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(.*?)"', page)]
    assert not [url for url in loaded if url.startswith(("http:", "https:", "//")) and "site_url" not in url]
    assert (tmp_path / "site" / "assets" / "mathjax" / "tex-svg.js").exists()


def test_every_public_module_has_an_entry_in_the_reference():
    entries = re.findall(r"^::: (\S+)$", "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md")), re.M)
    assert len(entries) == len(set(entries))
    core = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "xlm_hf").rglob("[!_]*.py")]
    families = [path.parent.relative_to(ROOT) for path in (ROOT / "modeling").glob("*/__init__.py")]
    linked = ("xlm_hf.modeling.", "xlm_hf.configs.")
    modules = {".".join(path.parts) for path in core} | {".".join(("xlm_hf", *path.parts)) for path in families}
    wanted = {m for m in modules if not m.startswith(linked) or m.count(".") == 2}
    assert wanted - set(entries) == set()


@pytest.mark.parametrize(
    ("origin", "link"),
    [
        ("https://name:secret@github.com/a/b.git", "https://github.com/a/b"),
        ("git@github.com:a/b.git", "https://github.com/a/b"),
        ("ssh://git@host.org/a/b", "https://host.org/a/b"),
        ("/srv/a/b.git", None),
    ],
)
def test_the_site_links_the_repository_that_it_is_built_from(origin, link, monkeypatch):
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    answer = subprocess.CompletedProcess([], 0, stdout=f"{origin}\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    config = SimpleNamespace(repo_url=None, repo_name=None)
    assert hooks["on_config"](config).repo_url == link
