"""Every family through the shipped suite; a family added later is here by being registered."""

import pytest

from tests.clean_environment import exports_load_in_a_fork  # noqa: F401 - a fixture
from xlm_hf.families import families
from xlm_hf.modeling.mdlm import MDLMCollator
from xlm_hf.objectives.collators import Entry
from xlm_hf.testing import (
    CHECKS,
    FamilyCase,
    check_batch_composition,
    check_batch_entries,
    check_generation,
    check_training_and_resume,
)


@pytest.fixture(scope="module", params=families())
def family(request):
    return request.param


@pytest.fixture(scope="module")
def case(family):
    return FamilyCase(family)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_family(case, check, tmp_path):
    check(case, tmp_path)


class TextCollator(MDLMCollator):
    layouts = {"lm": "[BOS] target [EOS]"}


class InfillingCollator(MDLMCollator):
    layouts = {"infill": "target"}


@pytest.mark.parametrize(("name", "kind"), [("TextCollator", "lm"), ("InfillingCollator", "infill")])
def test_a_family_of_one_kind_is_asked_for_no_other(name, kind, tmp_path):
    case = FamilyCase("mdlm", f"collator._target_=tests.test_families.{name}", "trainer.max_steps=5")
    assert case.kinds == (case.kind,) == (kind,)
    for check in (check_batch_composition, check_batch_entries, check_generation, check_training_and_resume):
        check(case, tmp_path / check.__name__)


def test_an_entry_that_is_not_what_it_is_declared_to_be_is_found(tmp_path, monkeypatch):
    case = FamilyCase("mdlm")
    wrong = {
        "alpha": Entry("position"),
        "weights": Entry("target"),
        "logits_index": Entry("target", index_of="document"),
    }
    for name, entry in wrong.items():
        monkeypatch.setattr(MDLMCollator, "entries", {**MDLMCollator.entries, name: entry})
        with pytest.raises(AssertionError):
            check_batch_entries(case, tmp_path)
        monkeypatch.undo()
