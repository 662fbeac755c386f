"""The text-generation pipeline that every export brings along."""

from typing import Any

import torch
from transformers import TextGenerationPipeline
from transformers.pipelines.text_generation import Chat, ReturnType


class XLMTextGenerationPipeline(TextGenerationPipeline):
    """`pipeline("text-generation")`, which gives the text that `generate` writes.

    The pipeline of transformers cuts the result at the length of the prompt that went in, has default options of its
    own, and decodes the new tokens apart from the prompt. Here `generate` says which tokens are new, the options that
    a call leaves out are the model's, and the new text is what the whole row has more than its prompt. A prompt with
    mask tokens is filled in, and comes back whole.
    """

    _default_generation_config = None  # type: ignore[assignment]

    def check_model_type(self, supported_models: Any) -> None:
        """Every model that has this pipeline writes, whatever its Auto class."""

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """What is written after a text, or each of several; no text at all gives an empty list."""
        return [] if isinstance(text_inputs, list) and not text_inputs else super().__call__(text_inputs, **kwargs)

    def preprocess(self, prompt_text, add_special_tokens=None, **kwargs: Any):  # type: ignore[override]
        """Tokenize a prompt, in the layout that the tokenizer was exported with; blanks are filled in without it."""
        if not isinstance(prompt_text, (str, Chat)):
            raise ValueError(f"A prompt must be a text, or a list of turns of a chat, and is {prompt_text!r}.")
        mask_token = self.tokenizer.mask_token  # type: ignore[union-attr]
        if add_special_tokens is None and mask_token and isinstance(prompt_text, str) and mask_token in prompt_text:
            add_special_tokens = False
        return super().preprocess(prompt_text, add_special_tokens=add_special_tokens, **kwargs)

    def _forward(self, model_inputs, **generate_kwargs: Any):  # type: ignore[override]
        generate_kwargs.pop("prefix_length", None)
        options = self._prepare_generate_kwargs(generate_kwargs)
        options.update(return_dict_in_generate=True, return_history=True)
        # No text at all comes as numbers that are no integers.
        ids, mask = model_inputs["input_ids"].long(), model_inputs.get("attention_mask")
        model: Any = self.model
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
        is_new = output.history >= 0
        shape = (len(ids), len(is_new) // len(ids), -1)
        # A row that wrote nothing is all prompt; the others agree on where it ends.
        width = int(torch.where(is_new.any(dim=-1), is_new.int().argmax(dim=-1), is_new.shape[1]).min())
        return {
            "generated_sequence": output.sequences.reshape(shape),
            "input_ids": output.sequences.reshape(shape)[:, 0, :width],
            "is_filled": (ids == self.tokenizer.mask_token_id).any(dim=-1),  # type: ignore[union-attr]
            "prompt_text": model_inputs["prompt_text"],
        }

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Any,
        return_type: Any = ReturnType.FULL_TEXT,
        skip_special_tokens: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The result as transformers gives it: `generated_text`, or `generated_token_ids` with `return_tensors`."""
        is_filled, prompt = bool(model_outputs.pop("is_filled").any()), model_outputs["prompt_text"]
        if return_type == ReturnType.TENSORS or not isinstance(prompt, str):
            return super().postprocess(model_outputs, return_type, skip_special_tokens=skip_special_tokens, **kwargs)
        options: dict[str, Any] = {"skip_special_tokens": skip_special_tokens is not False}
        options["clean_up_tokenization_spaces"] = kwargs.get("clean_up_tokenization_spaces")
        tokenizer: Any = self.tokenizer
        records, width = [], model_outputs["input_ids"].shape[-1]
        for ids in model_outputs["generated_sequence"][0].tolist():
            text, before = (tokenizer.decode(part, **options) for part in (ids, ids[:width]))
            if is_filled:
                text = text if prompt.startswith(" ") else text.removeprefix(" ")
            else:
                text = (
                    text.removeprefix(before) if text.startswith(before) else tokenizer.decode(ids[width:], **options)
                )
                text = prompt + text if return_type == ReturnType.FULL_TEXT else text
            records.append({"generated_text": text})
        return records
