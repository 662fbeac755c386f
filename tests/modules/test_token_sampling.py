import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.token_sampling import filter_logits, sample_categorical


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, None, None), (1.0, 3, None), (1.0, None, 0.6), (1.5, 5, 0.8)]
)
def test_filters_agree_with_transformers(temperature, top_k, top_p):
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p), expected)


def test_draws_follow_the_softmax_and_never_take_what_is_excluded():
    logits = torch.tensor([1.0, -torch.inf, 0.3, -2.0, -torch.inf, 2.0, -torch.inf])
    num = 20_000
    draws = sample_categorical(logits.expand(num, -1), uniform(3, torch.arange(num)))
    counts = torch.bincount(draws, minlength=7)
    allowed = logits.isfinite()
    assert counts[~allowed].sum() == 0
    assert (
        chisquare(counts[allowed].numpy(), (logits.softmax(-1)[allowed].double() * num).numpy(), sum_check=False).pvalue
        > 1e-4
    )


def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_entry():
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf, 1.0, -torch.inf])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_categorical(logits.expand(2, -1), ends).tolist() == [1, 4]


def test_rare_tokens_can_be_drawn_in_float32():
    """A token of probability 1e-9 occupies its share of the unit interval."""
    logits = torch.log(torch.tensor([1e-9, 1.0]))
    assert int(sample_categorical(logits, torch.tensor(0.5e-9, dtype=torch.float64))) == 0
    assert int(sample_categorical(logits, torch.tensor(2e-9, dtype=torch.float64))) == 1


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"temperature": 1e300}, {"top_p": 1e-300}])
def test_extreme_options_leave_something_to_draw(options):
    logits = torch.tensor([[0.5, 2.0, -torch.inf, 1.0]])
    probabilities = filter_logits(logits, **options).softmax(dim=-1)
    expected = [1 / 3, 1 / 3, 0, 1 / 3] if options.get("temperature") == 1e300 else [0.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(probabilities, torch.tensor([expected]))
