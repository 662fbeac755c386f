from unittest import mock

import pytest
import torch
from torch import nn

from tests.host_reads import HostReads
from xlm_hf.modules import devices
from xlm_hf.modules.vocabulary_head import suppress_
from xlm_hf.objectives import head_operator
from xlm_hf.objectives.head_operator import IGNORED_ID, linear_cross_entropy

H, V, SUPPRESSED = 5, 11, (0, 1, 4, 10)


def chunks_of(num_rows):
    return mock.patch.object(head_operator, "rows_per_chunk", return_value=num_rows)


@pytest.fixture(params=["host", "accelerator"])
def way(request, monkeypatch):
    """Chunks that end where groups do, which the host reads; or cut at fixed rows, as where it would have to wait."""
    monkeypatch.setattr(devices, "_HOST", ("cpu",) if request.param == "host" else ())
    return request.param


def problem(grouped, dtype=torch.float64, seed=0):
    """Hidden states, a head and targets: groups of one row, of two and of more than a chunk, one target twice."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([4, 4, 20, 20, 20, 20, 20, 31])
    rows = torch.tensor([0, 1, 1, 1, 2, 6, 6, 7]) if grouped else torch.arange(8)
    ids = torch.tensor([2, 3, 3, 5, 6, 7, 9, 8])
    hidden = torch.randn(8, H, generator=generator, dtype=dtype).requires_grad_()
    head = nn.Linear(H, V, bias=False).to(dtype)
    head.weight.data = torch.randn(V, H, generator=generator, dtype=dtype)
    weights = torch.rand(8, generator=generator, dtype=dtype)
    return (
        hidden,
        head,
        ids,
        {"target_weights": weights, **({"target_rows": rows, "groups": groups} if grouped else {})},
    )


def slow(hidden, head, ids, options):
    """A loop over targets, each with the cells of its group."""
    logits = hidden @ head.weight.T
    allowed = [v for v in range(V) if v not in SUPPRESSED]
    groups = options.get("groups", torch.arange(len(hidden))).tolist()
    rows = options.get("target_rows", torch.arange(len(ids))).tolist()
    losses = []
    for row, token in zip(rows, ids.tolist(), strict=True):
        cells = [logits[r, v] for r in range(len(hidden)) if groups[r] == groups[row] for v in allowed]
        losses.append(torch.stack(cells).logsumexp(0) - logits[row, token])
    best = [
        max(allowed, key=lambda v: float(logits[r, v].detach())) == v for r, v in zip(rows, ids.tolist(), strict=True)
    ]
    return (options["target_weights"] * torch.stack(losses)).sum(), torch.stack(losses).detach(), best


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [8, 3, 1])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_a_loop(grouped, rows_per_chunk, seed):
    hidden, head, ids, options = problem(grouped, seed=seed)
    with chunks_of(rows_per_chunk):
        output = linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
    expected, losses, best = slow(hidden, head, ids, options)
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.losses, losses)
    assert output.correct.tolist() == best
    # The trainer divides the sum: the gradients scale with it.
    inputs = (hidden, head.weight)
    for gradient, reference in zip(
        torch.autograd.grad(output.loss_sum / 7, inputs), torch.autograd.grad(expected / 7, inputs), strict=True
    ):
        torch.testing.assert_close(gradient, reference)
    assert not output.losses.requires_grad


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [8, 3])
def test_a_target_that_is_ignored_changes_nothing_whatever_its_weight(grouped, rows_per_chunk):
    hidden, head, ids, options = problem(grouped)
    ignored = torch.tensor([False, True, False, False, True, False, False, True])
    ids = ids.masked_fill(ignored, IGNORED_ID)
    options["target_weights"] = options["target_weights"].masked_fill(ignored, torch.inf)
    with chunks_of(rows_per_chunk):
        output = linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
    options["target_weights"] = options["target_weights"].masked_fill(ignored, 0.0)
    expected, losses, best = slow(hidden, head, ids.clamp(min=2), options)
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.losses, losses.masked_fill(ignored, 0.0))
    assert output.correct.tolist() == [b and not i for b, i in zip(best, ignored.tolist(), strict=True)]
    inputs = (hidden, head.weight)
    for gradient, reference in zip(
        torch.autograd.grad(output.loss_sum, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("suppressed", [None, (), (0,)])
def test_no_id_need_be_suppressed(suppressed):
    hidden, head, ids, options = problem(grouped=False)
    gradients = []
    for rows in (8, 3):
        with chunks_of(rows):
            loss_sum = linear_cross_entropy(hidden, head, suppressed, ids, **options).loss_sum
        gradients.append(torch.autograd.grad(loss_sum, (hidden, head.weight)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("grouped", [False, True])
def test_many_rows_go_in_chunks_and_groups_stay_whole_or_are_passed_twice(grouped, way, monkeypatch):
    """Under a plain linear head; any other makes all logits at once."""
    sizes, plain = [], head_operator.suppress_
    monkeypatch.setattr(head_operator, "suppress_", lambda x, ids: (sizes.append(len(x)), plain(x, ids))[1])
    hidden, head, ids, options = problem(grouped)
    with chunks_of(3):
        linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
        assert sizes == ([3, 3, 2] * (1 + grouped) if not grouped or way == "accelerator" else [2, 5, 1])
        sizes.clear()
        with chunks_of(8):
            linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
        assert sum(sizes) == 8
        sizes.clear()
        linear_cross_entropy(hidden, nn.Sequential(head), SUPPRESSED, ids, **options)
        monkeypatch.setattr(head.weight, "ds_id", 0, raising=False)
        linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
    assert sizes == [8, 8]


def test_chunks_have_rows_enough_and_are_even():
    cpu = torch.device("cpu")
    assert [head_operator.rows_per_chunk(size, cpu) for size in (1_000, 50_257, 128_000)] == [2097, 128, 128]
    assert [x.stop - x.start for x in head_operator._chunks(260, 128, None)] == [87, 87, 86]
    assert head_operator._chunks(0, 128, None) == []


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grouped", [False, True])
def test_chunks_equal_the_whole_in_single_and_half_precision(grouped):
    hidden, head, ids, options = problem(grouped, torch.float32)
    for enabled, tolerance in ((False, 1e-5), (True, 2e-2)):
        results = []
        for rows_per_chunk in (8, 3):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), chunks_of(rows_per_chunk):
                output = linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
            assert output.loss_sum.dtype == output.losses.dtype == torch.float32
            results.append([output.loss_sum, *torch.autograd.grad(output.loss_sum, (hidden, head.weight))])
        for whole, chunks in zip(*results, strict=True):
            assert whole.dtype == chunks.dtype == torch.float32
            torch.testing.assert_close(chunks, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grouped", [False, True])
def test_a_frozen_head_gets_no_gradient_and_neither_does_an_evaluation(grouped):
    hidden, head, ids, options = problem(grouped)
    head.weight.requires_grad_(False)
    with chunks_of(3):
        frozen = linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
        with torch.no_grad():
            evaluated = linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
    expected = torch.autograd.grad(slow(hidden, head, ids, options)[0], hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen.loss_sum, hidden)[0], expected)
    assert not evaluated.loss_sum.requires_grad
    torch.testing.assert_close(evaluated.loss_sum, frozen.loss_sum.detach())


def test_a_second_backward_pass_is_refused():
    hidden, head, ids, options = problem(grouped=False)
    loss_sum = linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options).loss_sum
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()


def test_the_host_reads_groups_only_where_it_need_not_wait(way, monkeypatch):
    # The function behind the operator, in which no mode sees anything.
    monkeypatch.setattr(head_operator, "_chunked_head", head_operator._chunked_head._init_fn)
    hidden, head, ids, options = problem(grouped=True)
    with chunks_of(3), HostReads() as reads:
        linear_cross_entropy(hidden, head, SUPPRESSED, ids, **options)
    assert bool(reads.found) == (way == "host")


@pytest.mark.parametrize("ids", [None, [], [0, 1, 2], [3, 1], [10], [0, 5, 6, 10], list(range(V))])
def test_suppressed_ids_have_no_logit(ids):
    logits = suppress_(torch.zeros(2, 3, V), ids)
    assert logits.isneginf().any(0).any(0).nonzero().flatten().tolist() == sorted(ids or [])
