from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from xlm_hf.modeling.sedd.loss_sedd import ScoreEntropy
from xlm_hf.modeling.udlm.loss_udlm import UniformBound
from xlm_hf.modules.vocabulary_head import suppress_
from xlm_hf.objectives import head_operator, row_functions
from xlm_hf.objectives.head_operator import IGNORED_ID, head_losses
from xlm_hf.objectives.row_functions import CrossEntropy, HybridBound, RowFunction

RECORDED = load_file(Path(__file__).parents[1] / "fixtures/row_functions.safetensors")
S, H, V, MASK, SUPPRESSED = 12, 5, 11, 10, (0, 1, 4, 10)
ALLOWED = [v for v in range(V) if v not in SUPPRESSED]
N = len(ALLOWED)


def slow_cross_entropy(logits, x):
    return -logits[ALLOWED].log_softmax(0)[ALLOWED.index(x)]


def slow_hybrid(logits, x, z, alpha, u):
    """The two divergences of the bound, over the ids that may be predicted one by one."""
    p = dict(zip(ALLOWED, alpha * logits[ALLOWED].softmax(0) + u, strict=True))
    q = {v: alpha * (v == x) + u for v in ALLOWED}
    r = q[z] / p[z] if z != MASK else torch.ones((), dtype=logits.dtype)
    return sum(q[v] * (q[v] / p[v]).log() for v in ALLOWED) + r - 1 - r.log()


def slow_uniform(logits, x, z, noise):
    """Equation 16 of the paper, with one-hot vectors and probabilities of both ends."""
    alpha, index = 1 - noise, ALLOWED.index(z)
    x_bar = N * alpha * torch.tensor([float(v == x) for v in ALLOWED], dtype=logits.dtype) + 1 - alpha
    p_bar = N * alpha * logits[ALLOWED].softmax(0) + 1 - alpha
    ratios = (p_bar[index] * x_bar / (p_bar * x_bar[index])).log()
    return (N / p_bar[index] - N / x_bar[index] + (x_bar / x_bar[index] * ratios).sum()) / (N * alpha)


def slow_score_entropy(logits, x, z, target_ratio, ratio, offset):
    loss = torch.zeros((), dtype=logits.dtype)
    for y in ALLOWED:
        if y != z:
            true, log_score = target_ratio if y == x else ratio, logits[y] + offset
            loss = loss + log_score.exp() - true * log_score + (true * (true.log() - 1) if true > 0 else 0)
    return loss


def problem(name):
    """A row function, its slow twin and the tensors of both; z is x, another id, and the mask where it may be."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(4, S, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    x, other = torch.tensor(ALLOWED)[torch.randint(0, N, (2, S), generator=generator)]
    thirds = torch.arange(S) % 3
    z = other.where(thirds > 0, x)
    hybrid_z = z.masked_fill(thirds == 2, MASK)
    absorbed = thirds == 2
    return {
        "CrossEntropy": (CrossEntropy, slow_cross_entropy, (x,)),
        "UniformBound": (UniformBound, slow_uniform, (x, z, uniform[0])),
        "HybridBound": (HybridBound, slow_hybrid, (x, hybrid_z, uniform[0], (1 - uniform[0]) * uniform[1] / N)),
        # Where all is absorbed the only true ratio is that of x.
        "ScoreEntropy": (
            ScoreEntropy,
            slow_score_entropy,
            (x, hybrid_z, uniform[1], uniform[2].masked_fill(absorbed, 0.0), uniform[3]),
        ),
    }[name], uniform[0].flip(0)


NAMES = ["CrossEntropy", "UniformBound", "HybridBound", "ScoreEntropy"]


def hidden_and_head(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    head = nn.Linear(H, V, bias=False).to(dtype)
    head.weight.data = torch.randn(V, H, generator=generator, dtype=dtype)
    return torch.randn(S, H, generator=generator, dtype=dtype).requires_grad_(), head


def both(name, head_module, hidden, head, ignored=()):
    """(losses, gradients) by the row function and by automatic differentiation of its slow twin."""
    (make, slow, tensors), weights = problem(name)
    ids = tensors[0].clone()
    ids[list(ignored)] = IGNORED_ID
    others = [x.clone() for x in tensors[1:]]
    for x in others:
        x[list(ignored)] = 0
    output = head_losses(hidden, head_module, SUPPRESSED, make(ids, weights, *others))
    logits = suppress_(head(hidden), SUPPRESSED)
    rows = [
        slow(logits[i], int(x), *(t[i] if t.is_floating_point() else int(t[i]) for t in tensors[1:]))
        for i, x in enumerate(tensors[0])
    ]
    losses = torch.stack(rows).where(ids != IGNORED_ID, 0.0)
    inputs = (hidden, head.weight)
    return (
        (output.losses, *torch.autograd.grad(output.loss_sum, inputs)),
        (losses.detach(), *torch.autograd.grad((losses * weights).sum(), inputs)),
    )


def assert_equal(results, tolerance=1e-10):
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows_per_block", [1, 2, 100])
def test_losses_and_gradients_equal_automatic_differentiation_of_a_loop(name, rows_per_block, monkeypatch):
    monkeypatch.setattr(head_operator, "rows_per_chunk", lambda *_: 5)
    monkeypatch.setitem(row_functions._BLOCK_SIZES, "cpu", rows_per_block * V)
    hidden, head = hidden_and_head()
    assert_equal(both(name, head, hidden, head))
    # Another module than a linear map gives all logits at once.
    assert_equal(both(name, nn.Sequential(head), hidden, head))


@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_have_no_loss_whatever_stands_in_them(name):
    hidden, head = hidden_and_head()
    assert_equal(both(name, head, hidden, head, ignored=(0, 1, 2, 7)))


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_holds_one_node(name):
    (make, _, tensors), weights = problem(name)
    hidden, head = hidden_and_head()

    def step(hidden):
        return head_losses(hidden, head, SUPPRESSED, make(tensors[0], weights, *tensors[1:]))

    expected, compiled = step(hidden), torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    torch.testing.assert_close(compiled, expected)
    assert torch.equal(compiled.correct, expected.correct)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss_sum, hidden) for x in (compiled, expected)))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_single(name):
    hidden, head = hidden_and_head(torch.float32)
    (make, _, tensors), weights = problem(name)
    function = make(tensors[0], weights, *tensors[1:])
    expected = head_losses(hidden, head, SUPPRESSED, function)
    with torch.autocast("cpu", torch.bfloat16):
        output = head_losses(hidden, head, SUPPRESSED, function)
    assert output.losses.dtype == torch.float32
    torch.testing.assert_close(output.losses, expected.losses, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_correct_is_no_other_id_higher(name):
    (make, _, tensors), weights = problem(name)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(S, V, generator=generator, dtype=torch.float64)
    logits[torch.arange(0, S, 2), tensors[0][::2]] += 5
    logits = suppress_(logits, SUPPRESSED)
    output = head_losses(logits, nn.Identity(), SUPPRESSED, make(tensors[0], weights, *tensors[1:]))
    if name == "ScoreEntropy":
        # The score of z is 1.
        logits += tensors[-1][:, None]
        rows = (tensors[1] != MASK).nonzero()[:, 0]
        logits[rows, tensors[1][rows]] = 0
    assert output.correct.tolist() == (logits.argmax(-1) == tensors[0]).tolist()
    assert 0 < output.correct.sum() < S


def test_an_ignored_row_is_not_correct():
    logits = torch.zeros(2, V).scatter_(1, torch.zeros(2, 1, dtype=torch.int64), 5.0)
    output = head_losses(logits, nn.Identity(), None, CrossEntropy(torch.tensor([IGNORED_ID, 0]), torch.ones(2)))
    assert output.correct.tolist() == [False, True]


def test_uniform_bound_in_single_precision_at_a_large_vocabulary():
    size, noises = 50_257, [1e-3, 0.01, 0.1, 0.5, 0.9, 0.999]
    generator = torch.Generator().manual_seed(0)
    noise = torch.tensor(noises, dtype=torch.float64).repeat(4)
    x, other = torch.randint(0, size, (2, len(noise)), generator=generator)
    z = torch.cat([x[:6], other[6:12], x[12:18], other[18:]])
    logits = 3 * torch.randn(len(noise), size, generator=generator, dtype=torch.float64)
    # Half of the predictions are nearly sure of the token.
    logits[torch.arange(12, 24), x[12:]] = 25.0
    results = []
    for dtype in (torch.float64, torch.float32):
        scores = logits.to(dtype).requires_grad_()
        output = head_losses(scores, nn.Identity(), None, UniformBound(x, torch.ones(len(x)), z, noise.to(dtype)))
        results.append((output.losses, torch.autograd.grad(output.loss_sum, scores)[0].norm(dim=-1)))
    (exact, exact_norms), (losses, norms) = results
    assert ((losses - exact).abs() <= 0.01 * exact.abs() + 1e-5).all()
    assert ((norms - exact_norms).abs() <= 0.01 * exact_norms + 1e-5).all()


@pytest.mark.parametrize("noise", [1e-12, 1.0])
def test_uniform_bound_is_finite_at_both_ends_of_time(noise):
    logits = torch.randn(2, V, requires_grad=True)
    function = UniformBound(torch.tensor([2, 3]), torch.ones(2), torch.tensor([2, 5]), torch.full((2,), noise))
    output = head_losses(logits, nn.Identity(), None, function)
    output.loss_sum.backward()
    assert output.losses.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["UniformBound", "HybridBound", "ScoreEntropy"])
def test_suppressed_ids_do_not_count(name):
    """With ids that no sequence gets added to the vocabulary, no loss moves."""
    (make, _, tensors), weights = problem(name)
    hidden, head = hidden_and_head()
    logits = suppress_(head(hidden), SUPPRESSED).detach()
    function, wider = make(tensors[0], weights, *tensors[1:]), torch.cat([logits, torch.randn(S, 4)], dim=1)
    more = [*SUPPRESSED, *range(V, V + 4)]
    losses = head_losses(logits, nn.Identity(), SUPPRESSED, function).losses
    torch.testing.assert_close(head_losses(suppress_(wider, more), nn.Identity(), more, function).losses, losses)


def recorded(name):
    return {key.removeprefix(f"{name}."): x for key, x in RECORDED.items() if key.startswith(f"{name}.")}


def published(logits, make, suppressed, case, *others):
    """Losses (B, L) of recorded logits (B, L, V); the further tensors are (B, 1) or (B, L)."""
    shape, flat = case["x"].shape, [x.expand(case["x"].shape).flatten() for x in (case["x"], case["z"], *others)]
    weights = torch.ones_like(flat[0], dtype=torch.float64)
    output = head_losses(logits.flatten(0, 1), nn.Identity(), suppressed, make(flat[0], weights, *flat[1:]))
    return output.losses.view(shape)


def test_the_uniform_bound_is_that_of_published_code():
    case = recorded("uniform")
    torch.testing.assert_close(
        published(case["logits"], UniformBound, None, case, case["noise"][:, None]), case["rate"], rtol=1e-9, atol=1e-9
    )


def test_the_hybrid_bound_is_that_of_published_code():
    case = recorded("hybrid")
    losses = published(case["logits"], HybridBound, [14], case, case["alpha"], case["uniform"])
    # Its noise schedule goes through float32.
    torch.testing.assert_close(case["weights"] * losses, case["bound"], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_the_score_entropy_is_that_of_published_code(kind):
    case, sigma = recorded(f"score_{kind}"), RECORDED["score_sigma"]
    if kind == "absorb":
        target_ratios, ratios, suppressed = 1 / sigma.expm1(), torch.zeros_like(sigma), [13]
        counted = case["z"] == 13
    else:
        # q(y) / q(z) of one token: its own share e^-sigma, and (1 - e^-sigma) / N of each.
        rest = -(-sigma).expm1() / 13
        own = ((-sigma).exp() + rest) / rest
        target_ratios, ratios, suppressed, counted = own, torch.where(case["x"] == case["z"], 1 / own, 1.0), None, ...
    offsets = torch.zeros_like(sigma)
    losses = published(case["log_scores"], ScoreEntropy, suppressed, case, target_ratios, ratios, offsets)
    scale = 1 if kind == "absorb" else 1 / 13
    torch.testing.assert_close((scale * losses)[counted], case["entropy"][counted], rtol=1e-9, atol=1e-9)


def test_a_family_brings_a_row_function_of_its_own():
    class Squares(RowFunction):
        def losses_and_gradient_(self, logits, num_ids):
            losses = (logits**2).sum(dim=-1) / num_ids
            logits.mul_(2 * self.weights[:, None] / num_ids)
            return losses, torch.ones_like(losses, dtype=torch.bool)

    hidden, head = hidden_and_head()
    output = head_losses(hidden, head, None, Squares(torch.arange(S), torch.full((S,), 0.5)))
    expected = (head(hidden) ** 2).mean(dim=-1)
    torch.testing.assert_close(output.losses, expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(output.loss_sum, hidden), torch.autograd.grad(0.5 * expected.sum(), hidden)
    )
    del row_functions.ROW_FUNCTIONS["Squares"]
