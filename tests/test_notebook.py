"""The README and the first pages of the documentation, cell by cell in the kernel of a notebook."""

import shlex
import shutil

import pytest

from tests.test_docs import ROOT, blocks, folder, with_smallest_sizes  # noqa: F401

PAGES = ["README.md", "docs/index.md", "docs/quickstart.md", "docs/finetuning.md", "docs/plain_python.md"]
pytestmark = pytest.mark.slow


def cells(page):
    for not_run, language, title, text in blocks(ROOT / page):
        if title is not None:
            yield f"%%writefile {title}\n{text}"
        elif not_run is None and language == "python":
            yield text
        elif not_run is None and language == "bash":
            for line in filter(None, text.replace("\\\n", " ").splitlines()):
                words = shlex.split(line, comments=True)
                start = next(i for i, word in enumerate(words) if word.endswith(("run_xlm.py", "xlm-hf"))) + 1
                if not words[start].isidentifier():
                    words[start:] = with_smallest_sizes(words[start:])
                yield f"!{shlex.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_in_a_kernel(page, folder):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    assert shutil.which("xlm-hf"), "the package is not installed"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells(page)])
    # An error of a cell ends it.
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Error:" not in printed
    assert "Traceback" not in printed
    if page == "docs/plain_python.md":
        tables = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
        measured = [table for table in tables if "<th>Perplexity</th>" in table]
        assert measured
        assert not any("No log" in table for table in measured)
