"""From examples to batches for edit flows: which edits have been made, and which remain."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from xlm_hf.modules.checked_options import PartialShare, Positive, PositiveInt
from xlm_hf.modules.counter_random import unit_interval
from xlm_hf.objectives.alignment import BLANK, DELETE, INSERT, aligned
from xlm_hf.objectives.collation import Documents, Examples, random_subset, segment_numbers
from xlm_hf.objectives.collators import Collator, Entry
from xlm_hf.objectives.head_operator import IGNORED_ID

NONE, KEPT, DELETED, SUBSTITUTED = range(-1, 3)  # what remains to be done to the token of a slot


def columns_of(moves: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (C,) of the sources and of the targets in the columns of alignments, BLANK where there is none."""
    of_sources, of_targets = np.full((2, len(moves)), BLANK)
    of_sources[moves != INSERT], of_targets[moves != DELETE] = sources, targets
    return of_sources, of_targets


def random_columns(
    targets: np.ndarray, lengths: np.ndarray, noise: np.ndarray, deleted: np.ndarray, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of random tokens and each target: some are deleted, tokens of the target substitute the others.

    The order of the columns is drawn, and which of its tokens substitute others. The columns with the smallest bits are
    deletions, and those with the next smallest substitutions: one order gives both.

    Args:
        targets: tokens of the targets, one after the other.
        lengths: (D,) how many each has.
        noise: random tokens, as many for each target.
        deleted: (D,) how many of them are deleted.
        bits: (C,) uint64, for each column.

    Returns:
        what `columns_of` does, (C,).
    """
    num_noise, num_columns = np.full_like(lengths, len(noise) // len(lengths)), lengths + deleted
    is_deleted, has_noise = random_subset(bits, num_columns, np.stack((deleted, num_noise)))[0]
    of_noise, of_targets = np.full((2, len(bits)), BLANK)
    # Random masks are slower than their indices.
    of_targets[np.flatnonzero(~is_deleted)], of_noise[np.flatnonzero(has_noise)] = targets, noise
    return of_noise, of_targets


def remaining_events(
    bits: np.ndarray, lengths: np.ndarray, draws: np.ndarray, rest_draws: np.ndarray, beta: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which n of the K events of each document remain, n uniform in 0..K, and how much of the time is left then.

    Each event takes place at its own time, uniform in (0, 1). A bound integrates f(remaining events) / s over the time
    s that is left. Given n, s is the n-th smallest of K uniform draws. So f counts (K + 1) / n, and its variance is
    finite. With n = 0, s is 1 - u^(1 / (K + 1)), and s^-1 f counts 1.

    Args:
        bits: (N,) uint64 of the events, of all documents one after the other.
        lengths: (D,) K.
        draws: (D,) uniform in [0, 1), of n.
        rest_draws: (D,) uniform in [0, 1), of the time with n = 0.
        beta: n / (K + 1) is drawn from Beta(beta, 1), rounded down.

    Returns:
        (N,) bool, which events remain; (D,) s; (D,) the weight of f in the bound; (D,) that weight with beta = 1.
    """
    slots = lengths + 1
    n = (draws ** (1 / beta) * slots).astype(np.int64)
    remains, greatest = random_subset(bits, lengths, n)
    with np.errstate(divide="ignore"):
        rest = -np.expm1(np.log(rest_draws) / slots)
    time_left = np.where(n > 0, unit_interval(greatest), rest)
    even_weights = np.where(n > 0, slots / np.maximum(n, 1), 1 / rest)
    probabilities = ((n + 1) / slots) ** beta - (n / slots) ** beta
    return remains, time_left, even_weights / (probabilities * slots), even_weights


@dataclass(eq=False)
class EditFlowCollator(Collator):
    """Documents `[CLS] prompt [BOS] x`, x between what the flow begins with and the target, and the edits that remain.

    Beginning and target stand above each other in columns, with blanks where one of them has no token. Every column in
    which they differ is an edit, made at its own time, uniform in (0, 1) (arXiv 2506.09018, section 3). With K of them,
    n = floor(r (K + 1)) remain, r ~ Beta(drop_beta, 1), every n-subset alike; `remaining_events` says how much time is
    left then. With drop_beta = 1, n ~ U{0..K}. All draws are functions of (seed, epoch, example_id) and the document's
    number alone.

    Further arguments are those of `Collator`.

    Args:
        coupling: how the columns are made. "empty": the flow begins with nothing, and every token of the target is
            inserted. "uniform": it begins with `noise_length` random tokens, of which half are substituted by a random
            increasing subset of the target's tokens (at most all of them); the others are deleted between. "source": it
            begins with the column `source_ids`, and the columns are the alignment with the fewest edits: the column
            `alignment` (see `xlm_hf.objectives.alignment`), which is computed where it is not there.
        noise_length: of "uniform".
        drop_beta: for training alone: a larger one than 1 shows states in which more remains to be done. Each then
            counts as with 1.
        condition_dropout: for training alone: the share of documents whose prompts are left out, so that generation can
            be guided (`guidance_scale`).

    A training batch holds, for D documents in B rows of at most L tokens, with S slots in all:
        input_ids (B, L): the documents at their times, padded on the right.
        attention_mask (B, L): True for tokens.
        segment_ids, position_ids (B, L): document and position of each token, where a row holds several documents.
        time_left (B,): float32, 1 - alpha in (0, 1]; (B, L) where a row holds several documents.
        slot_index (S,): `[BOS]` and all tokens after it, as indices into the flattened (B x L) tokens.
        slot_documents (S,): their documents, in ascending order.
        first_slots (D,): where `[BOS]` of each document stands in `slot_index`.
        insertion_counts (S,): how many insertions into each slot remain.
        filled_slots (F,): the slots with at least one, as indices into `slot_index`.
        target_rows (T,): for each remaining insertion, where its slot stands in `filled_slots`; in ascending order.
        target_ids (T,): its token.
        weights (D,): float32, the weight of a document's loss in the bound.
        loss_weights (D,): float32, in its place in the loss, unless drop_beta is 1.
        sequence_tokens (D,): tokens of the text, and 1 for its end where there is one.
        example_id: of the examples, as given.
    and, unless the coupling is "empty":
        token_edits (S,): what remains to be done to the token of a slot: KEPT, DELETED, SUBSTITUTED; NONE for `[BOS]`.
        changed_slots (U,): the slots of the tokens that are substituted, as indices into `slot_index`.
        substitute_ids (U,): by which tokens.
    """

    layouts = {"lm": "[CLS] [BOS] target", "seq2seq": "[CLS] prompt [BOS] target"}
    entries = {
        **Collator.entries,
        "source_ids": Entry("example"),
        "source_mask": Entry("example"),
        "time_left": Entry("row"),
        "slot_index": Entry("slot", index_of="position"),
        # Slots that fill up a list are a group of their own, so that no softmax runs over them.
        "slot_documents": Entry("slot", index_of="document", padding="next"),
        "first_slots": Entry("document", index_of="slot"),
        "insertion_counts": Entry("slot", padding=IGNORED_ID),
        "token_edits": Entry("slot", padding=NONE),
        "filled_slots": Entry("filled", index_of="slot"),
        "target_rows": Entry("target", index_of="filled"),
        "target_ids": Entry("target", padding=IGNORED_ID),
        "changed_slots": Entry("changed", index_of="slot"),
        "substitute_ids": Entry("changed", padding=IGNORED_ID),
        "weights": Entry("document"),
        "loss_weights": Entry("document"),
        "sequence_tokens": Entry("document"),
    }

    coupling: Literal["empty", "uniform", "source"] = "empty"
    noise_length: PositiveInt = 100
    drop_beta: Positive = 1.0
    condition_dropout: PartialShare = 0.0

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The documents at their times, and the edits that remain."""
        self.check_content(documents.target_ids)
        before, after, lengths = self.columns(documents)
        self.check_lengths(documents.prompt_lengths + len(self.specials) + lengths, "sequence", self.specials)
        differs, of_columns = before != after, segment_numbers(lengths)
        num_edits = np.bincount(of_columns[differs], minlength=len(lengths))
        draws = (documents.low_discrepancy_draws(self.seed), documents.uniforms(self.seed, "time"))
        bits = documents.random_bits(self.seed, num_edits)
        chosen, time_left, weights, even_weights = remaining_events(bits, num_edits, *draws, self.drop_beta)
        remains = np.zeros_like(differs)
        remains[differs] = chosen
        # Whichever stands there now; np.where would take a branch that nothing foretells for each column.
        now = after + remains * (before - after)
        is_there = now != BLANK
        there = np.flatnonzero(is_there)
        num_there = np.bincount(of_columns[there], minlength=len(lengths))
        rows, starts = self.rows_of(documents, num_there)
        rows.write(starts, num_there, now[there])

        # A slot for [BOS] and for each token; that of a column is the last one up to it.
        num_slots = num_there + 1
        of_slots = is_there.cumsum() + of_columns
        inserted = np.flatnonzero(remains & (before == BLANK))
        filled = of_slots[inserted]
        counts = np.bincount(filled, minlength=num_slots.sum())
        is_filled = counts > 0
        skewed = {} if self.drop_beta == 1 else {"loss_weights": even_weights.astype(np.float32)}
        return rows.batch(
            time_left=rows.shared(time_left.astype(np.float32)),
            slot_index=rows.index(starts - 1, num_slots),
            slot_documents=segment_numbers(num_slots),
            first_slots=num_slots.cumsum() - num_slots,
            insertion_counts=counts,
            filled_slots=np.flatnonzero(is_filled),
            target_rows=is_filled.cumsum()[filled] - 1,
            target_ids=after[inserted],
            weights=weights.astype(np.float32),
            sequence_tokens=documents.target_lengths + documents.ends,
            **self.token_edits(after[there], remains[there], of_slots[there], len(counts)),
            **skewed,
        )

    def columns(self, documents: Documents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (C,) of beginning and target in the columns, BLANK where there is none, and columns of each (D,)."""
        targets, lengths = documents.target_ids, documents.target_lengths
        if self.coupling == "empty":
            return np.full_like(targets, BLANK), targets, lengths
        if self.coupling == "uniform":
            num, writable = np.full_like(lengths, self.noise_length), self.writable_ids
            deleted = num - np.minimum(num // 2, lengths)
            bits = documents.random_bits(self.seed, lengths + deleted, stream="columns")
            draws = documents.uniforms(self.seed, "noise", num)
            noise = writable[(draws * len(writable)).astype(np.int64)]
            return *random_columns(targets, lengths, noise, deleted, bits), lengths + deleted
        sources, source_lengths = self.sources(documents.examples)
        if all("alignment" in example for example in documents.examples):
            rows = [bytes(example["alignment"]) for example in documents.examples]
            moves, num_columns = np.frombuffer(b"".join(rows), np.uint8), np.array([*map(len, rows)])
        else:
            moves, num_columns = aligned(sources, source_lengths, targets, lengths)
        return *columns_of(moves, sources, targets), num_columns

    def token_edits(self, after, remains, slots, num_slots: int) -> dict[str, np.ndarray]:
        """What remains to be done to the tokens that are there."""
        if self.coupling == "empty":
            return {}
        is_deleted, token_edits = after == BLANK, np.full(num_slots, NONE)
        token_edits[slots] = remains * (SUBSTITUTED - is_deleted)
        substituted = np.flatnonzero(remains & ~is_deleted)
        changes = {"changed_slots": slots[substituted], "substitute_ids": after[substituted]}
        return {"token_edits": token_edits, **changes}

    def prediction_batch(self, examples: Examples) -> dict[str, torch.Tensor]:
        """The prompts for `generate` and, if the flow begins with given texts, these, padded on the right."""
        batch = super().prediction_batch(examples)
        return batch | self.padded_sources(examples) if self.coupling == "source" else batch
