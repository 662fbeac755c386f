"""Every family through the shipped suite; a family added later is here by being registered."""

import pytest

from xlm_hf.families import families
from xlm_hf.testing import CHECKS, FamilyCase


@pytest.fixture(scope="module", params=families())
def family(request):
    return request.param


@pytest.fixture(scope="module")
def case(family):
    return FamilyCase(family)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_family(case, check, tmp_path):
    check(case, tmp_path)
