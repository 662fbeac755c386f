"""Slow, plain counterparts of edit flows, for their tests: everything is enumerated."""

import itertools
import math
import random
from collections import Counter
from functools import cache

import numpy as np
import torch
from torch import nn

from tests.modeling.naive import (
    BOS,
    CLS,
    FIRST_WORD,
    PAD,
    draw,
    dropped_at_random,
    grid_of_losses,
    in_grid,
    make_canvas,
    padded,
)
from xlm_hf.modeling.edit_flow import EditFlowConfig, EditFlowGenerationConfig
from xlm_hf.modeling.edit_flow.generation_edit_flow import EditFlowGenerationMixin, EditRates
from xlm_hf.modeling.edit_flow.modeling_edit_flow import EditFlowOutput
from xlm_hf.modules.counter_random import uniform
from xlm_hf.modules.generation import row_seeds
from xlm_hf.modules.noise_schedules import make_schedule
from xlm_hf.modules.vocabulary_head import head_fields

WORDS = (FIRST_WORD, FIRST_WORD + 1)
VOCABULARY = FIRST_WORD + 2
BLANK = -1
LADDER = ("gather", "rows", "width", "head")


def slow_loss(model, batch, block=None, dense=True):
    """Of insertions alone, with independent rates: those expected less 1 + log n + log p of each that remains."""
    ids, mask = padded(batch, block)
    outputs = model(ids, attention_mask=mask, time_left=batch["time_left"])
    rows, columns = in_grid(batch["slot_index"], batch)
    counts = torch.zeros(ids.shape).index_put((rows, columns), batch["insertion_counts"].float())
    is_slot = torch.zeros(ids.shape, dtype=torch.bool).index_put((rows, columns), torch.tensor(True))
    slots = batch["filled_slots"][batch["target_rows"]]
    losses = grid_of_losses(outputs.logits, (rows[slots], columns[slots]), batch["target_ids"], dense)
    n = outputs.rates.expected(batch["time_left"][:, None, None])[..., 0]
    return batch["weights"] @ (losses + (n - counts * (1 + n.log())).where(is_slot, 0.0)).sum(dim=1)


def slow_collation(examples, vocab_size, dense):
    """Insertions from nothing: n of K remain, and the time that is left is Beta(n, K - n + 1)."""
    batch = dropped_at_random(examples, vocab_size, dense)
    sizes = [2 + len(e["prompt_ids"]) + len(e["target_ids"]) for e in examples]
    num = (torch.tensor(sizes) - batch["attention_mask"].sum(dim=1)).tolist()
    left = [
        random.betavariate(n, k - n + 1) if n else 1 - random.random() ** (1 / (k + 1))
        for n, k in zip(num, [len(e["target_ids"]) for e in examples], strict=True)
    ]
    return {**batch, "time_left": torch.tensor(left)}


@torch.no_grad()
def slow_sampler(model, prompts, max_new_tokens, do_sample, seed, savings=(), num_steps=None):
    """Tau-leaping of a flow from nothing: each slot gets a token or not, from the right."""
    (B, P), N = prompts.shape, num_steps or max_new_tokens
    seeds = row_seeds(seed, B, prompts.device)
    ids, columns = make_canvas(prompts, max_new_tokens, model.config.pad_token_id)
    lengths, finished = torch.full((B,), P), torch.zeros(B, dtype=torch.bool)
    for step in range(N):
        rows = (~finished if "rows" in savings else torch.ones_like(finished)).nonzero().squeeze(-1)
        now, then = (torch.tensor(1 - k / N, dtype=torch.float64) for k in (step, step + 1))
        width = int(lengths[rows].max()) if "width" in savings else ids.shape[1]
        seen, mask = ids[rows, :width], columns[rows, :width] < lengths[rows, None]
        slots = mask & (columns[rows, :width] >= P - 1)
        index = {"slot_index": slots.flatten().nonzero().squeeze(-1)} if "head" in savings else {}
        outputs = model(seen, attention_mask=mask, time_left=now.float().expand(len(rows)), **index)
        edits = outputs.rates.between(now, then)[..., 0].double()
        if index:
            edits = torch.zeros(seen.shape, dtype=torch.float64).masked_scatter(slots, edits)
        numbers = torch.arange(1 - P, width - P + 1)
        inserted = slots & (uniform(seeds[rows, None], step, numbers, 0) < -torch.expm1(-edits))
        uniforms = uniform(seeds[rows, None], step, numbers, 3) if do_sample else None
        if "head" in savings or "gather" in savings:
            logits = outputs.logits[inserted[slots]] if index else outputs.logits[inserted]
            drawn = draw(logits, None if uniforms is None else uniforms[inserted])
        else:
            drawn = draw(outputs.logits.log_softmax(dim=-1), uniforms)[inserted]
        tokens = torch.zeros_like(seen).masked_scatter(inserted, drawn)
        for row, words, is_made in zip(rows.tolist(), tokens, inserted, strict=True):
            free = ids.shape[1] - lengths[row]
            for column in reversed(is_made.nonzero().squeeze(-1).tolist()[:free]):
                ids[row, column + 2 :] = ids[row, column + 1 : -1].clone()
                ids[row, column + 1] = words[column]
                lengths[row] += 1
        finished |= lengths == ids.shape[1]
        if finished.all():
            break
    return ids[:, : int(lengths.max())]


def random_law(longest=2, seed=1, words=WORDS):
    """A law of texts of 0 to `longest` words."""
    texts = [text for length in range(longest + 1) for text in itertools.product(words, repeat=length)]
    return dict(zip(texts, np.random.default_rng(seed).dirichlet(np.ones(len(texts)) * 0.8), strict=True))


def gauss(num):
    """Nodes and weights of a quadrature over (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return (nodes + 1) / 2, weights / 2


def from_nothing(text):
    """The only columns of the coupling "empty"."""
    yield (BLANK,) * len(text), text, 1.0


def from_noise(noise_length, words=WORDS):
    """Columns of the coupling "uniform": every choice of deleted columns, substituted tokens and random words."""

    def columns(text):
        substituted = min(noise_length // 2, len(text))
        num = len(text) + noise_length - substituted
        deletions = list(itertools.combinations(range(num), noise_length - substituted))
        substitutions = list(itertools.combinations(range(len(text)), substituted))
        for deleted, changed in itertools.product(deletions, substitutions):
            for noise in itertools.product(words, repeat=noise_length):
                drawn, tokens = iter(noise), iter(enumerate(text))
                before, after = [], []
                for column in range(num):
                    number, token = (None, BLANK) if column in deleted else next(tokens)
                    before.append(next(drawn) if number is None or number in changed else BLANK)
                    after.append(token)
                yield tuple(before), tuple(after), 1 / len(deletions) / len(substitutions) / len(words) ** noise_length

    return columns


def states(before, after):
    """Every state between two sequences in columns: tokens that are there, remaining edits, how many of how many.

    An edit is ("insert", slot, word), ("delete", number of the token) or ("substitute", number of the token, word).
    """
    differs = [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    for made in itertools.product((False, True), repeat=len(differs)):
        remaining = {i for i, is_made in zip(differs, made, strict=True) if not is_made}
        there, edits = [], []
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            token = old if i in remaining else new
            if token != BLANK:
                there.append(token)
            if i in remaining:
                if old == BLANK:
                    edits.append(("insert", len(there), new))
                else:
                    edits.append(("delete", len(there) - 1) if new == BLANK else ("substitute", len(there) - 1, new))
        yield tuple(there), edits, len(remaining), len(differs)


class ExactTables:
    """The exact expectations of a law over texts: how often each edit is still to come, given a state and the time."""

    def __init__(self, law, columns=from_nothing, constant=None):
        """`constant` is a known mistake, a network that is not told the time: constant are its "counts" or "rates"."""
        self.law, self.columns, self.constant = law, columns, constant
        self.at = cache(self._at)

    def _at(self, time_left):
        counts, mass = {}, Counter()
        for text, p in self.law.items():
            for before, after, q in self.columns(text):
                for there, edits, n, num in states(before, after):
                    w = p * q * time_left**n * (1 - time_left) ** (num - n)
                    mass[there] += w
                    of_state = counts.setdefault(there, Counter())
                    for edit in edits:
                        of_state[edit] += w
        return {there: {e: w / mass[there] for e, w in counts[there].items()} for there in mass if mass[there] > 0}

    def rates(self, there, time_left):
        """Counts of edits whose rates are frozen, and the slack that freezes them."""
        time_left = 0.5 if self.constant else max(time_left, 1e-12)
        # A state that no text leads to: the discretised sampler gets there.
        expected = self.at(time_left).get(there, {})
        if self.constant == "counts":
            return expected, lambda kind: 1e-30
        slack = 1e3
        return {edit: n / time_left * (slack + time_left) for edit, n in expected.items()}, lambda kind: slack


class RandomTables:
    """Random rates, consistent with no law; how they depend on the time is up to the slack."""

    def __init__(self, kinds=3, words=WORDS, scale=1.0):
        self.kinds, self.words, self.scale = kinds, words, scale
        self.at = cache(self._at)

    def _at(self, there):
        rng = np.random.default_rng([len(there), *there])
        edits = [("insert", i, word) for i in range(len(there) + 1) for word in self.words]
        edits += [("delete", i) for i in range(len(there))] if self.kinds > 1 else []
        edits += [
            ("substitute", i, word)
            for i in range(len(there))
            for word in self.words
            if self.kinds > 1 and word != there[i]
        ]
        slack = dict(zip(("insert", "delete", "substitute"), rng.uniform(0.1, 1.0, size=3), strict=True))
        return dict(zip(edits, self.scale * rng.gamma(1.0, size=len(edits)), strict=True)), slack.get

    def rates(self, there, time_left):
        """See `ExactTables`."""
        return self.at(there)


KINDS = ("insert", "delete", "substitute")


class TableModel(nn.Module, EditFlowGenerationMixin):
    """Tables in place of the network."""

    def __init__(self, tables, vocab_size=VOCABULARY, **options):
        super().__init__()
        special = list(range(FIRST_WORD))
        options = {"vocab_size": vocab_size, "max_position_embeddings": 16, "suppress_tokens": special} | options
        self.config = EditFlowConfig(**options)
        self.generation_config = EditFlowGenerationConfig()
        self.device = torch.device("cpu")
        self.noise_schedule = make_schedule(self.config.noise_schedule)
        self.tables = tables

    def row(self, there, time_left):
        """Counts and slack (n + 1, K), and logits (n + 1, V) of insertions and substitutions, of one sequence."""
        K, V, num = self.config.num_edit_kinds, self.config.vocab_size, len(there) + 1
        counts, slack_of = self.tables.rates(there, time_left)
        of_slots, logits = np.zeros((num, K)), np.zeros((2, num, V))
        for (kind, i, *word), n in counts.items():
            slot = i + (kind != "insert")
            of_slots[slot, KINDS.index(kind)] += n
            if word:
                logits[KINDS.index(kind) // 2, slot, word[0]] += n
        if self.config.insertion_head == "joint":
            # What a network says elsewhere means nothing.
            of_slots[:, 0] = [of_slots[:, 0].sum()] + [0.7] * len(there)
        # Nor what it says of editing [BOS], and of a token in its own place.
        of_slots[0, 1:] = 5.0
        logits[1, range(1, num), there] = 5.0
        slack = np.broadcast_to([slack_of(kind) for kind in KINDS[:K]], (num, K))
        # Where no token has a rate, any will do.
        logits[logits.sum(axis=-1) == 0, FIRST_WORD:] = 1e-300
        with np.errstate(divide="ignore"):
            return of_slots, slack, np.log(logits)

    def forward(
        self,
        input_ids,
        attention_mask,
        time_left,
        slot_index,
        insertion_slots=None,
        substitution_slots=None,
        head_function=None,
    ):
        # Many rows are alike: each is looked up once.
        timed = time_left.double() if isinstance(self.tables, ExactTables) else torch.ones_like(time_left).double()
        columns = (timed[:, None], attention_mask.double(), input_ids.double())
        rows, which = torch.unique(torch.cat(columns, dim=1), dim=0, return_inverse=True)
        L, R, K, V = input_ids.shape[1], len(rows), self.config.num_edit_kinds, self.config.vocab_size
        counts, slack = (torch.ones(R, L, K, dtype=torch.float64) for _ in range(2))
        logits = torch.zeros(2, R, L, V, dtype=torch.float64)
        for row, (time, *values) in enumerate(rows.tolist()):
            ids = [int(token) for token, is_there in zip(values[L:], values[:L], strict=True) if is_there]
            start = int(values[:L].index(1.0)) + ids.index(BOS)
            found = self.row(tuple(ids[ids.index(BOS) + 1 :]), time)
            at = slice(start, start + len(found[0]))
            counts[row, at], slack[row, at], logits[:, row, at] = (torch.from_numpy(x.copy()) for x in found)
        of_slots = [x[which].flatten(0, 1)[slot_index] for x in (counts, slack, *logits)]
        rates, logits = EditRates(*of_slots[:2]), of_slots[2:]
        wanted = [logits[0] if insertion_slots is None else logits[0][insertion_slots]]
        if K > 1:
            wanted.append(logits[1] if substitution_slots is None else logits[1][substitution_slots])

        def with_rates(*args):
            return head_function(*args, rates=rates)

        return EditFlowOutput(**head_fields(torch.cat(wanted), nn.Identity(), None, with_rates), rates=rates)


def poisson_terms(expected, edits, num):
    """What the bound adds up in a state: expected edits less 1 + log n for each that remains; `num` per edit."""
    return sum(expected.values()) - sum(1 + math.log(expected[edit]) for edit in edits)


def exact_bound(tables, text, columns=from_nothing, num=40):
    """The bound for a text, by summing over its states and quadrature over the time left, v^4."""
    total = 0.0
    for v, weight in zip(*gauss(num), strict=True):
        time_left = v**4
        for before, after, q in columns(text):
            for there, edits, n, of in states(before, after):
                p = q * time_left**n * (1 - time_left) ** (of - n)
                counts, slack_of = tables.rates(there, time_left)
                expected = {e: c * time_left / (slack_of(e[0]) + time_left) for e, c in counts.items()}
                total += weight * 4 * v**3 * p / time_left * poisson_terms(expected, edits, n)
    return total


def batch_of_states(text, time_left, columns=from_nothing, has_changes=False):
    """All states of a text at a time, one to a row, as the collator would make a batch of them; their probabilities."""
    rows = [
        (there, edits, q * time_left**n * (1 - time_left) ** (of - n))
        for before, after, q in columns(text)
        for there, edits, n, of in states(before, after)
    ]
    width = max(len(there) for there, _, _ in rows) + 2
    input_ids = torch.full((len(rows), width), PAD)
    names = ("slot_index", "slot_documents", "first_slots", "insertion_counts", "filled_slots", "target_rows")
    batch = {name: [] for name in (*names, "target_ids", "token_edits", "changed_slots", "substitute_ids")}
    for row, (there, edits, _) in enumerate(rows):
        input_ids[row, : len(there) + 2] = torch.tensor([CLS, BOS, *there])
        first = len(batch["slot_index"])
        batch["first_slots"].append(first)
        for i in range(len(there) + 1):
            batch["slot_index"].append(row * width + 1 + i)
            batch["slot_documents"].append(row)
            inserted = [edit[2] for edit in edits if edit[:2] == ("insert", i)]
            batch["insertion_counts"].append(len(inserted))
            if inserted:
                batch["target_rows"] += [len(batch["filled_slots"])] * len(inserted)
                batch["filled_slots"].append(first + i)
                batch["target_ids"] += inserted
            changes = [edit for edit in edits if edit[0] != "insert" and edit[1] == i - 1]
            kind = {"delete": 1, "substitute": 2}[changes[0][0]] if changes else 0 if i else -1
            batch["token_edits"].append(kind)
            if kind == 2:
                batch["changed_slots"].append(first + i)
                batch["substitute_ids"].append(changes[0][2])
    made = {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}
    if not has_changes:
        made = {name: x for name, x in made.items() if name in names or name == "target_ids"}
    made.update(
        input_ids=input_ids,
        attention_mask=input_ids != PAD,
        time_left=torch.full((len(rows),), time_left, dtype=torch.float64),
        weights=torch.full((len(rows),), 1 / time_left, dtype=torch.float64),
        sequence_tokens=torch.full((len(rows),), len(text) + 1),
    )
    return made, torch.tensor([p for _, _, p in rows], dtype=torch.float64)


def applied(there, inserts, deletes, substitutes, capacity):
    """A sequence after a step: what is inserted beyond the capacity, in reading order, is left out."""
    free = capacity - sum(i not in deletes for i in range(len(there)))
    new = []
    for slot in range(len(there) + 1):
        if slot and slot - 1 not in deletes:
            new.append(substitutes.get(slot - 1, there[slot - 1]))
        if slot in inserts and free > 0:
            new.append(inserts[slot])
            free -= 1
    return tuple(new)


def expected_edits(tables, there, now, then):
    """The integral of each edit's rate over a step."""
    counts, slack_of = tables.rates(there, now)
    return {e: c * math.log((slack_of(e[0]) + now) / (slack_of(e[0]) + then)) for e, c in counts.items()}


def tau_leap_law(tables, start, grid, capacity, guided=None):
    """The law of the text after steps between the times of the grid, by enumerating every set of edits."""
    is_growing = getattr(tables, "kinds", 1) == 1
    law = Counter(start)
    for now, then in itertools.pairwise(grid):
        new: Counter = Counter()
        for there, p in law.items():
            if is_growing and len(there) == capacity:
                new[there] += p
                continue
            for after, q in step_law(tables, there, now, then, capacity).items():
                new[after] += p * q
        law = new
    return law


def step_law(tables, there, now, then, capacity):
    """All sequences after one step of tau-leaping, and their probabilities."""
    edits = expected_edits(tables, there, now, then)
    choices = []
    for slot in range(len(there) + 1):
        of_slot = {e[2]: n for e, n in edits.items() if e[:2] == ("insert", slot)}
        choices.append(one_or_none({("insert", slot, w): n for w, n in of_slot.items()}))
        choices.append(one_or_none({e: n for e, n in edits.items() if e[0] != "insert" and e[1] == slot}))
    law: Counter = Counter()
    for drawn in itertools.product(*(choice.items() for choice in choices)):
        p = math.prod(q for _, q in drawn)
        made = [edit for edit, _ in drawn if edit is not None]
        law[
            applied(
                there,
                {e[1]: e[2] for e in made if e[0] == "insert"},
                {e[1] for e in made if e[0] == "delete"},
                {e[1]: e[2] for e in made if e[0] == "substitute"},
                capacity,
            )
        ] += p
    return law


def one_or_none(edits):
    """At least one event of rates: one of the edits in proportion to theirs; None if there is no event."""
    total = sum(edits.values())
    law = {None: math.exp(-total)}
    for edit, n in edits.items():
        law[edit] = -math.expm1(-total) * n / total
    return law


def event_law(tables, texts, start, grid, capacity, num=200):
    """The law of the text with one edit at a time, by a Volterra equation for each step, backwards from its end.

    With F(x, s) the probabilities of all texts at the end t of the step, from x at the time s, and H the edits expected
    from s to t, F(x, s) = exp(-H) 1[x] + integral over s' of H / (s - t) exp(-H (s - s') / (s - t)) sum p(x') F(x',
    s').
    """
    number = {there: i for i, there in enumerate(texts)}
    law = np.array([start.get(there, 0.0) for there in texts])
    for now, then in itertools.pairwise(grid):
        times = then + (now - then) * np.linspace(0, 1, num + 1) ** 2
        F = np.zeros((num + 1, len(texts), len(texts)))
        F[0] = np.eye(len(texts))
        for j in range(1, num + 1):
            totals, moves = np.zeros(len(texts)), np.zeros((len(texts), len(texts)))
            for there, i in number.items():
                edits = expected_edits(tables, there, times[j], then)
                totals[i] = sum(edits.values())
                for (kind, at, *word), n in edits.items():
                    after = applied(
                        there,
                        {at: word[0]} if kind == "insert" else {},
                        {at} if kind == "delete" else set(),
                        {at: word[0]} if kind == "substitute" else {},
                        capacity,
                    )
                    moves[i, number[after]] += n / totals[i]
            x = (times[j] - times[: j + 1]) / (times[j] - then)
            density = totals[:, None] * np.exp(-totals[:, None] * x) / (times[j] - then)
            steps = np.diff(times[: j + 1])
            trapezoid = np.append(steps / 2, 0.0) + np.append(0.0, steps / 2)
            kernel = density * trapezoid
            known = np.exp(-totals)[:, None] * np.eye(len(texts))
            known += np.einsum("ij,jik->ik", kernel[:, :-1], np.einsum("il,jlk->jik", moves, F[:j]))
            # The last node of the quadrature is the unknown itself.
            F[j] = np.linalg.solve(np.eye(len(texts)) - kernel[:, -1:] * moves, known)
            F[j] /= F[j].sum(axis=-1, keepdims=True)
        law = law @ F[num]
    return dict(zip(texts, law, strict=True))


def looped_loss(model, batch):
    """The training loss of a batch, from the model's dense outputs, one document at a time."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    outputs = model(ids, attention_mask=mask, time_left=batch["time_left"])
    L, total = ids.shape[1], 0.0
    weights = batch.get("loss_weights", batch["weights"])
    filled = batch["filled_slots"][batch["target_rows"]].tolist()
    changes = dict(
        zip(batch.get("changed_slots", torch.tensor([])).tolist(), batch.get("substitute_ids", []), strict=True)
    )
    for document, weight in enumerate(weights):
        slots = (batch["slot_documents"] == document).nonzero().squeeze(-1).tolist()
        flat = batch["slot_index"][slots]
        row, columns = int(flat[0]) // L, (flat % L).tolist()
        rates = outputs.rates.counts[row] / (outputs.rates.slack[row] + batch["time_left"][row])
        expected = rates * batch["time_left"][row]
        log_q = outputs.logits[row].log_softmax(-1)
        joint = outputs.logits[row, columns].flatten().log_softmax(0).view(len(columns), -1)
        is_joint = model.config.insertion_head == "joint"
        sum_ = expected[columns[0], 0] if is_joint else expected[columns, 0].sum()
        for slot, token in zip(filled, batch["target_ids"].tolist(), strict=True):
            if slot in slots:
                i = slots.index(slot)
                if is_joint:
                    sum_ = sum_ - 1 - expected[columns[0], 0].log() - joint[i, token]
                else:
                    sum_ = sum_ - 1 - expected[columns[i], 0].log() - log_q[columns[i], token]
        if "token_edits" in batch:
            for slot, column in zip(slots[1:], columns[1:], strict=True):
                kind = int(batch["token_edits"][slot])
                sum_ = sum_ + expected[column, 1] + expected[column, 2]
                if kind == 1:
                    sum_ = sum_ - 1 - expected[column, 1].log()
                if kind == 2:
                    scores = outputs.substitution_logits[row, column].clone()
                    scores[ids[row, column]] = -torch.inf
                    sum_ = sum_ - 1 - expected[column, 2].log() - scores.log_softmax(-1)[changes[slot]]
        total = total + weight * sum_
    return total
