"""The arguments of the trainer."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class XLMTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults that counter-based collators and honest logs need.

    Attributes:
        remove_unused_columns: False, since the collators read the columns that the model does not.
        logging_nan_inf_filter: False, since a loss that is not a number must be seen.
        muon_learning_rate: trains the weight matrices of the layers by Muon at this rate, and the rest by AdamW at
            `learning_rate`; None trains everything by `optim`. Both rates follow the schedule.
        ema_decay: in [0, 1), of the exponential moving average of the weights (see `ExponentialMovingAverage`), which
            is then evaluated, exported and pushed; None keeps none.
        use_ema: whether evaluation and export take the averaged weights; the average is kept in any case.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep the columns that the collators read."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Show a loss that is not a number."})
    muon_learning_rate: float | None = field(default=None, metadata={"help": "Muon's rate for the layers' matrices."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the average of the weights."})
    use_ema: bool = field(default=True, metadata={"help": "Evaluate and export the averaged weights."})

    def __post_init__(self):
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must be in [0, 1) and is {self.ema_decay}: 0.9999 averages over about 10,000 steps."
            )
        super().__post_init__()
        # Pinned memory speeds up copies to an accelerator; without one torch warns about it at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
