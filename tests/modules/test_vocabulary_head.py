import math

import pytest
import torch
from torch import nn

from xlm_hf.modules import vocabulary_head
from xlm_hf.modules.vocabulary_head import LogitsOnDemand, head_fields


def definitions(logits):
    """Every statistic of rows of logits, from its definition and in double precision."""
    values = {name: [] for name in ("maximum", "log_mass", "confidence", "margin", "entropy")}
    for row in logits.double().tolist():
        mass = sum(math.exp(z - max(row)) for z in row)
        p = sorted((math.exp(z - max(row)) / mass for z in row), reverse=True)
        values["maximum"].append(max(row))
        values["log_mass"].append(max(row) + math.log(mass))
        values["confidence"].append(p[0])
        values["margin"].append(p[0] - p[1])
        values["entropy"].append(-sum(x * math.log(x) for x in p if x))
    return {name: torch.tensor(of_rows) for name, of_rows in values.items()}


def assert_statistics_are_those_of(logits, expected):
    for name, values in definitions(expected).items():
        torch.testing.assert_close(logits.statistic(name), values, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("block_size", [40, 170, 10_000])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_statistics_made_in_blocks_are_those_of_the_whole(block_size, bias, monkeypatch):
    """Suppressed ids of whole blocks among them, logits far from zero, and a head that is more than a product."""
    torch.manual_seed(0)
    x, head = torch.randn(30, 8), nn.Linear(8, 53, bias=bias)
    head.weight.mul_(4)
    x[3] *= 30
    suppressed = [*range(14), 20, 52]
    expected = head(x)
    expected[:, suppressed] = -torch.inf
    monkeypatch.setitem(vocabulary_head._BLOCK_SIZES, "cpu", block_size)
    monkeypatch.setattr(vocabulary_head, "_BLOCK_ROWS", 7)
    assert_statistics_are_those_of(LogitsOnDemand(x, head, suppressed), expected)
    assert_statistics_are_those_of(LogitsOnDemand(x, nn.Sequential(head), suppressed), expected)
    kept = expected.clone()
    assert_statistics_are_those_of(LogitsOnDemand.of(kept), expected)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(LogitsOnDemand(x, head, suppressed)[torch.tensor([4, 1])], expected[[4, 1]])


def test_one_possible_token_is_sure_and_none_has_no_mass():
    logits = torch.full((2, 6), -torch.inf)
    logits[0, 1] = 4.0
    made = LogitsOnDemand.of(logits)
    for name, value in {"confidence": 1.0, "margin": 1.0, "entropy": 0.0, "log_mass": 4.0, "maximum": 4.0}.items():
        assert made.statistic(name)[0] == value
    assert made.statistic("log_mass")[1] == made.statistic("maximum")[1] == -torch.inf


@torch.no_grad()
def test_a_processor_sees_the_rows_of_its_logits_and_comes_before_the_options():
    head, ids, seen = nn.Linear(4, 9, bias=False), torch.arange(6).view(2, 3), []

    def processor(rows, logits, cur_step):
        seen.append((rows.tolist(), cur_step))
        return logits + 1

    x = torch.randn(3, 4)
    logits = LogitsOnDemand(x, head, [0]).processed([2], processor, ids, torch.tensor([1, 3, 5]), step=7)
    expected = head(x) + 1
    expected[:, [0, 2]] = -torch.inf
    torch.testing.assert_close(logits[:], expected)
    assert seen == [([[0, 1, 2], [3, 4, 5], [3, 4, 5]], 7)]
    assert_statistics_are_those_of(logits, expected)


@torch.no_grad()
def test_automatic_mixed_precision_applies_to_the_statistics_as_to_the_logits():
    x, head = torch.randn(5, 16), nn.Linear(16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        logits = LogitsOnDemand(x, head)
        expected = head(x).float()
        assert not torch.equal(expected, nn.functional.linear(x.double(), head.weight.double()).float())
        assert_statistics_are_those_of(logits, expected)


def test_a_head_function_takes_the_place_of_the_logits():
    head, states = nn.Linear(4, 7), torch.randn(3, 4)
    logits = head_fields(states, head, [2], None)
    assert list(logits) == ["logits"]
    assert (logits["logits"][:, 2] == -torch.inf).all()
    assert head_fields(states, head, [2], lambda *given: given) == {"head_output": (states, head, [2])}
