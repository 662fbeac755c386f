"""Every family through the shipped suite; a family added later is here by being registered."""

import pytest

from xlm_hf.families import families
from xlm_hf.testing import CHECKS, FamilyCase


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("family", families())
def test_family(family, check, tmp_path):
    check(FamilyCase(family), tmp_path)
