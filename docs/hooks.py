"""What the site adds to its pages: a link to the repository, plots, links for arXiv ids, formulas with their commas."""

import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ARXIV = re.compile(r"\barXiv[ \n](\d{4}\.\d{4,5})\b")
_FORMULA = re.compile(r'(<span class="arithmatex">[^<]*</span>)([.,;:!?)]+|(?:-\w+)+[.,;:)]*)')
# Text that is a link or code already stays as it is.
_AS_IT_IS = re.compile(r"(<a\b.*?</a>|<code\b.*?</code>|<pre\b.*?</pre>|<[^>]*>)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the repository that the site is built from: the clone's `origin`, where it has one on a server."""
    command = ["git", "remote", "get-url", "origin"]
    try:
        origin = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return config
    # https://[user:token@]host/path or git@host:path; never what logs in.
    if match := re.fullmatch(r"(?:\w+://)?(?:[^@/]*@)?([\w.-]+\.\w+)[:/](.+?)(?:\.git)?/?", origin):
        config.repo_url = f"https://{match[1]}/{match[2]}"
        config.repo_name = match[2]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the plots of the benchmarks, which lie beside their figures: `results/<comparison>_<plot>.png`."""
    for plot in sorted(Path("benchmarks/results").glob("*/quality_*.png")):
        name = f"results/{plot.parent.name}_{plot.stem.removeprefix('quality_')}.png"
        files.append(File.generated(config, name, abs_src_path=str(plot.absolute())))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Make a link of each arXiv id in the text of a page, and let no line begin with what follows a formula."""
    parts = _AS_IT_IS.split(html)
    parts[::2] = [_ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', part) for part in parts[::2]]
    return _FORMULA.sub(r'<span class="unbroken">\1\2</span>', "".join(parts))
