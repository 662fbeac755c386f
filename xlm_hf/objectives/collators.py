"""What the collators of all families share: the layout of a document, the checks on it, and what batches declare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from xlm_hf.modules.checked_options import CheckedOptions, PartialShare, PositiveInt
from xlm_hf.modules.messages import did_you_mean
from xlm_hf.objectives.collation import Documents, Examples, Ids, Rows, column, ragged, tensors

# What an entry of a batch may have one value for, beside lists of its own.
AXES = ("position", "row", "document", "example")


@dataclass(frozen=True)
class Entry:
    """What one entry of a batch holds, so that other code can pad or move it without knowing its family.

    Attributes:
        of: what the entry has one value for. In a batch of N examples and D documents in B rows of L positions:
            "position": (B, L, ...);
            "row": what all tokens of a document share: (B, ...), and (B, L, ...) where a row holds several documents
                (see `Rows.shared`);
            "document": (D, ...), in the order of the rows' examples;
            "example": (N, ...);
            any other name: a list, (S, ...), as long as all other entries of that name, of at most B x L values.
        index_of: if the values are indices, what they point to: "position" (in the flattened B x L), "document",
            "example", or the name of a list.
        padding: what fills up a longer list or row: a value; "last", the last value again; or "next", one more than
            the last, for a group of its own after the others.
    """

    of: str
    index_of: str | None = None
    padding: int | Literal["last", "next"] = "last"


@dataclass(eq=False)
class Collator(CheckedOptions):
    """From examples to batches: what the collators of all families share.

    The collator of a family says how its documents are laid out (`layouts`) and what its batches hold (`entries`), and
    makes training batches of documents in `training_batch`.

    Args:
        tokenizer: names the special tokens.
        max_length: positions of the model; a longer document is refused.
        kind: of the task, one of `kinds`.
        prediction: whether to make prompts for `generate` instead of training batches.
        seed: of the corruption.
        packing: whether a row may hold several examples, up to `max_length` tokens; no token sees another document.

    Attributes:
        layouts: for each kind of task that the family has, a document in words: special tokens such as `[BOS]`,
            `prompt` and `target`. What stands before `target` is the prompt of `generate`. The target is `input_ids` of
            an example of plain text ("lm") and `target_ids` of all others.
        kinds: of `layouts`.
        entries: of the batches, by name.
        written_specials: names of the special tokens that a text may hold.
        condition_dropout: share of the training documents whose prompts are left out.
        row_capacity: most tokens of a row that holds several examples; None where each has its own.

    A family adds options as annotated attributes of a dataclass, and refuses what does not fit in `__post_init__`.
    Called with a list of examples - dicts of the columns above, `example_id`, `epoch` and `position` (in the epoch) -
    it returns a dict of tensors. Prompts are padded on the left: `input_ids`, `attention_mask`, `example_id`.

    Raises:
        ValueError: for a kind that the family does not have.
    """

    layouts: ClassVar[Mapping[str, str]]
    kinds: ClassVar[tuple[str, ...]]
    written_specials: ClassVar[tuple[str, ...]] = ("unk",)
    condition_dropout = 0.0
    entries: ClassVar[Mapping[str, Entry]] = {
        "input_ids": Entry("position"),
        "attention_mask": Entry("position", padding=0),
        "segment_ids": Entry("position"),
        "position_ids": Entry("position"),
        "example_id": Entry("example"),
    }

    tokenizer: PreTrainedTokenizerBase
    max_length: PositiveInt
    kind: str
    prediction: bool = False
    seed: int = 0
    packing: bool = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "layouts"):
            cls.kinds = tuple(cls.layouts)

    def __post_init__(self):
        self.check()
        words, tokenizer = self.layout(self.kind).split(), self.tokenizer
        self.target_column = "input_ids" if self.kind == "lm" else "target_ids"
        self.pad_token_id = tokenizer.pad_token_id
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        written = {getattr(tokenizer, f"{name}_token_id") for name in self.written_specials}
        # Byte-level tokenizers name their end of a text for what is unknown too.
        written -= {None} if "eos" in self.written_specials else {None, self.eos_token_id}
        self.is_suppressed = np.isin(np.arange(self.vocab_size), list(set(tokenizer.all_special_ids) - written))
        self.row_capacity = self.max_length if self.packing else None
        before, behind = words[: words.index("target")], words[words.index("target") + 1 :]
        at = before.index("prompt") if "prompt" in before else len(before)
        self.prompt_specials = [word for word in before if word != "prompt"]
        self.specials = [*self.prompt_specials, *behind]
        # The ids before the prompt, and those between it and the target.
        self.head, self.tail = (
            [getattr(tokenizer, f"{word[1:-1].lower()}_token_id") for word in part]
            for part in (before[:at], before[at + 1 :])
        )

    @cached_property
    def writable_ids(self) -> np.ndarray:
        """The ids that a text may hold."""
        return np.flatnonzero(~self.is_suppressed)

    @property
    def given(self) -> tuple[str, ...]:
        """What prompts for `generate` tell of the reference: ("length",) where its length is given."""
        return ()

    @classmethod
    def layout(cls, kind: str) -> str:
        """The layout of a kind; raises ValueError for one that the family does not have."""
        if kind not in cls.kinds:
            raise ValueError(f"{cls.__name__} has no kind {kind!r}: {did_you_mean(kind, cls.kinds)}")
        return cls.layouts[kind]

    @classmethod
    def num_special_tokens(cls, kind: str) -> int:
        """Special tokens of a document of a kind, beside its prompt and its target."""
        return cls.layout(kind).count("[")

    def __call__(self, examples: Examples) -> dict[str, torch.Tensor]:
        """Build a batch.

        Raises:
            ValueError: for an id outside the vocabulary, a document that is too long, or an entry that is not declared.
        """
        batch = self.prediction_batch(examples) if self.prediction else self.training_batch(self.documents(examples))
        if not batch.keys() <= self.entries.keys():
            name, undeclared = type(self).__name__, min(batch.keys() - self.entries.keys())
            raise ValueError(f"{name}.entries does not declare {undeclared!r} of its batches: add an Entry.")
        return batch

    def training_batch(self, documents: Documents) -> dict[str, torch.Tensor]:
        """The batch for the loss; a family's own."""
        raise NotImplementedError

    def prediction_batch(self, examples: Examples) -> dict[str, torch.Tensor]:
        """The prompts for `generate`: what stands before the target, or in infilling the input with its blanks."""
        if self.kind == "infill":
            return self.left_padded(examples, [[*self.head, *self.tail, *e["input_ids"]] for e in examples])
        # Plain text has the beginning to go on from, if any.
        prompts = [e["prompt_ids"] if self.kind == "seq2seq" else e.get("prompt_ids", []) for e in examples]
        return self.left_padded(examples, [[*self.head, *prompt, *self.tail] for prompt in prompts])

    def sources(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """The texts that are to be edited, one after the other, and the length of each: the column `source_ids`.

        Raises:
            ValueError: if there is no such column, or for an id that belongs into no text.
        """
        if any("source_ids" not in example for example in examples):
            raise ValueError("Edits of given texts need a column source_ids: choose a task that has it.")
        ids, lengths = ragged([example["source_ids"] for example in examples])
        self.check_ids(ids)
        self.check_content(ids)
        return ids, lengths

    def padded_sources(self, examples: Examples) -> dict[str, torch.Tensor]:
        """`sources` for `generate`, padded on the right: `source_ids`, `source_mask`."""
        ids, lengths = self.sources(examples)
        mask = np.arange(max(lengths.max(), 1)) < lengths[:, None]
        padded = np.full(mask.shape, self.pad_token_id)
        padded[mask] = ids
        return tensors(source_ids=padded, source_mask=mask)

    def documents(self, examples: Examples) -> Documents:
        """The documents of examples, their ids checked, some prompts left out."""
        prompts = [e["prompt_ids"] for e in examples] if self.kind == "seq2seq" else [[] for _ in examples]
        targets = [e[self.target_column] for e in examples]
        documents = Documents(examples, prompts, targets)
        self.check_ids(documents.prompt_ids, documents.target_ids)
        if self.kind == "infill":
            for example, target in zip(examples, targets, strict=True):
                if len(example["input_ids"]) != len(target):
                    found = f"{len(example['input_ids'])} input_ids and {len(target)} target_ids"
                    raise ValueError(f"Example {example['example_id']} has {found}: give the whole solution.")
            given, _ = ragged([e["input_ids"] for e in examples])
            self.check_ids(given)
            documents.blank = given == self.mask_token_id
        if self.condition_dropout:
            documents.drop_prompts(documents.uniforms(self.seed, "condition") < self.condition_dropout)
        return documents

    def check_ids(self, *ids: np.ndarray) -> None:
        """Raise ValueError if an id is outside the vocabulary."""
        for every in ids:
            # As an unsigned integer a negative id is a large one.
            outside = every[every.view(np.uint64) >= self.vocab_size]
            if len(outside):
                found = f"Token id {outside[0]} is outside the vocabulary of {self.vocab_size}"
                raise ValueError(f"{found}: tokenize the data with the tokenizer of this run.")

    def check_content(self, ids: np.ndarray) -> None:
        """Raise ValueError for a special token that belongs into no text of this family."""
        special = ids[self.is_suppressed[ids]]
        if len(special):
            hint = "" if "eos" in self.written_specials else ", and keep documents apart by task.document_masks=true"
            found = f"A text holds the special token {special[0]}, which this model never writes"
            raise ValueError(f"{found}: tokenize the data without special tokens{hint}.")

    def check_lengths(self, lengths: np.ndarray, what: str, specials: Sequence[str]) -> None:
        """Raise ValueError if a `what` has more tokens than the model has positions, `specials` included."""
        if lengths.max() > self.max_length:
            extras = f" with {' and '.join(specials)}" if specials else ""
            found = f"A {what} has {lengths.max()} tokens{extras}, and the model has {self.max_length} positions"
            raise ValueError(f"{found}: shorten it or raise max_position_embeddings.")

    def rows_of(self, documents: Documents, lengths: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Rows of documents with their special tokens and prompts, and `lengths` (D,) positions after those.

        Returns:
            the rows, and where in its document what follows the prompt begins (D,).
        """
        prompts, ahead = documents.prompt_lengths, len(self.head)
        starts = prompts + (ahead + len(self.tail))
        rows = Rows(starts + lengths, documents, self.pad_token_id, self.row_capacity)
        for number, token in enumerate(self.head):
            rows.input_ids[rows.first + number] = token
        rows.write(ahead, prompts, documents.prompt_ids)
        for number, token in enumerate(self.tail, ahead):
            rows.input_ids[rows.first + prompts + number] = token
        return rows, starts

    def left_padded(self, examples: Examples, rows: Ids) -> dict[str, torch.Tensor]:
        """Checked prompts for `generate`, padded on the left: `input_ids`, `attention_mask`, `example_id`."""
        ids, lengths = ragged(rows)
        self.check_ids(ids)
        self.check_lengths(lengths, "prompt", self.prompt_specials)
        attention_mask = np.arange(-lengths.max(), 0) >= -lengths[:, None]
        input_ids = np.full(attention_mask.shape, self.pad_token_id)
        input_ids[attention_mask] = ids
        return tensors(input_ids=input_ids, attention_mask=attention_mask, example_id=column(examples, "example_id"))


@dataclass(eq=False)
class CanvasCollator(Collator):
    """Documents of a prompt and a canvas of positions, which a family that writes into masks or noise fills.

    A canvas holds the target, `[EOS]` if the canvas has a position left for it, and `[PAD]` up to its end. In infilling
    it is the blanks of the sequence, which stays as it is.

    Further arguments are those of `Collator`.

    Args:
        canvas_length: how the length of a target is modelled. A number is the length of every canvas: padding up to it
            is content, seen, corrupted and predicted like any other token; a target that fills the canvas has no
            `[EOS]`. None takes lengths as given: a canvas is the target and, where the document ends, `[EOS]`.
        condition_dropout: for training alone, the share of the documents whose prompts are left out, so that the model
            also learns what it writes without (classifier-free guidance, arXiv 2207.12598).

    Raises:
        ValueError: for a share out of its range.
    """

    layouts = {"lm": "[BOS] target [EOS]", "seq2seq": "prompt [BOS] target [EOS]", "infill": "target"}
    written_specials = ("pad", "eos", "unk")

    canvas_length: PositiveInt | None = None
    condition_dropout: PartialShare = 0.0

    def canvas(self, documents: Documents) -> tuple[Rows, np.ndarray, np.ndarray]:
        """Rows of documents `prompt [BOS] canvas`, or of whole sequences in infilling.

        Returns:
            the rows, and start and length of the canvas of each document, (D,); in infilling those of the sequence, of
            which `documents.blank` are to be filled in.

        Raises:
            ValueError: for a target that is longer than the canvas, or a sequence that is too long.
        """
        targets = documents.target_lengths
        lengths = targets if self.kind == "infill" else targets + documents.ends
        if self.canvas_length is not None and self.kind != "infill":
            if targets.max() > self.canvas_length:
                found = f"A target has {targets.max()} tokens and the canvas {self.canvas_length} positions"
                raise ValueError(f"{found}: raise canvas_length (max_new_tokens of the task), or shorten the target.")
            lengths = np.full_like(lengths, self.canvas_length)
        num_specials = len(self.prompt_specials)
        self.check_lengths(documents.prompt_lengths + num_specials + lengths, "sequence", self.specials)
        rows, starts = self.rows_of(documents, lengths)
        rows.write(starts, targets, documents.target_ids)
        rows.input_ids[(rows.first + starts + targets)[targets < lengths]] = self.eos_token_id
        return rows, starts, lengths
