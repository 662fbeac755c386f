import gc
import os
from collections import Counter

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


def _cpu_seconds():
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


# The hooks below print what the tests of a family cost.
def pytest_runtest_setup(item):
    """Remember when a test begins."""
    item.cpu_start = _cpu_seconds()


def pytest_runtest_teardown(item):
    """Report the CPU seconds of a test that has a parameter or a fixture parameter `family`."""
    family = getattr(getattr(item, "callspec", None), "params", {}).get("family")
    if family is not None:
        item.user_properties.append(("cpu_seconds", (str(family), _cpu_seconds() - item.cpu_start)))


def pytest_terminal_summary(terminalreporter):
    """Print the CPU seconds of each family's tests."""
    total = Counter()
    for report in terminalreporter.stats.get("", []):
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == "cpu_seconds":
                    total[value[0]] += value[1]
    if total:
        costs = ", ".join(f"{family} {seconds:.1f}" for family, seconds in sorted(total.items()))
        terminalreporter.write_line(f"CPU seconds of each family's tests: {costs}")
