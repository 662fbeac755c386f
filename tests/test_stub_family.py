"""A family that was written after `docs/new_family.md`, outside of the package: it passes the suite as it is."""

from pathlib import Path
from unittest import mock

import pytest

from tests.clean_environment import exports_load_in_a_fork  # noqa: F401 - a fixture
from tests.test_structure import code_lines
from xlm_hf import families as registry
from xlm_hf.testing import CHECKS, FamilyCase

FOLDER = Path(__file__).parent / "fixtures" / "stub_family"


@pytest.fixture(scope="module", params=["stub"])
def family(request):
    with mock.patch.dict(registry._FAMILIES):
        import tests.fixtures.stub_family  # noqa: F401

        yield request.param


@pytest.fixture(scope="module")
def case(family):
    return FamilyCase(family, f"hydra.searchpath=[file://{FOLDER / 'configs'}]")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_it_passes_the_suite(case, check, tmp_path):
    check(case, tmp_path)


def test_it_is_small():
    assert sum(map(code_lines, FOLDER.glob("*.py"))) < 150
