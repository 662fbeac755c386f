"""Generation by unmasking: a canvas of mask tokens, filled a few positions at a time."""

from xlm_hf.modules.masked_generation import CanvasGenerationConfig, MaskedGenerationMixin


class MLMGenerationConfig(CanvasGenerationConfig):
    """Options of `MLMForMaskedLM.generate`: those of unmasking by a rule, see `ConfidenceSampler`.

    `max_new_tokens` is the size of the canvas. With `order="random"`, `do_sample=True` and one token a step a decode
    follows the model's law in a random order exactly; every other rule trades that for quality or speed.
    """


class MLMGenerationMixin(MaskedGenerationMixin):
    """Adds `generate` to the masked language model.

    It also takes `canvas_lengths` (B,), the length of each row's canvas where that is given and not to be modelled; 0
    only fills in the prompt's mask tokens.
    """

    generation_inputs = ("canvas_lengths",)
    writes_once = True
