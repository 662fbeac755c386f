import gc
import os

import pytest

# Read when torch starts: small tensors are slower on several threads, and two test runs share a machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_finish():
    """Let no collection of garbage go through what the imports have made: each training begins with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Prepared tasks go to a folder of the test run, not to the user's cache."""
    monkeypatch.setenv("XLM_HF_CACHE", str(tmp_path_factory.getbasetemp() / "xlm_hf_cache"))


# Imported when torch's threads are set; they print the CPU seconds of each family's tests.
from xlm_hf.testing import pytest_runtest_setup, pytest_runtest_teardown, pytest_terminal_summary  # noqa: E402, F401
