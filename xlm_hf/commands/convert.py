"""`xlm-hf convert --from PROJECT CHECKPOINT OUT`: a published checkpoint as a model folder of ours."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from xlm_hf.commands._run import say
from xlm_hf.families import families
from xlm_hf.hub.conversion import load_translated, read_arguments, read_checkpoint, translate_checkpoint
from xlm_hf.hub.export import export_model
from xlm_hf.modules.backbone_config import token_options
from xlm_hf.modules.messages import did_you_mean
from xlm_hf.tasks.tokenizers import NUMBER_TOKENS, number_tokenizer

_NUMBERS = "numbers"


def main(arguments: list[str]) -> None:
    """Read the checkpoint, and write the folder that `checkpoint=OUT` and `AutoModel` load.

    Args:
        arguments: of the command line, after `convert`.

    Raises:
        ValueError: if the checkpoint cannot be read or converted, or the family or the tokenizer is not known.
    """
    projects = sorted({project for family in families().values() for project in family.converters})
    parser = argparse.ArgumentParser("xlm-hf convert", description=__doc__)
    parser.add_argument("--from", dest="source", required=True, help=f"the project: {', '.join(projects)}")
    parser.add_argument("checkpoint", help="a Lightning .ckpt, or a folder or Hub id with a model.safetensors")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--family", help="needed where the tensors fit several")
    parser.add_argument("--config", type=Path, help="JSON of constructor arguments (config.json beside the weights)")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, where averages are held too")
    parser.add_argument("--tokenizer", help=f"a folder or Hub id, or {_NUMBERS!r}: special tokens and numbers")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the tokenizer brings")
    options = parser.parse_args(arguments)
    if options.source not in projects:
        raise ValueError(f"No family converts {options.source!r}: {did_you_mean(options.source, projects)}")
    weights, config = read_checkpoint(options.checkpoint, ema=not options.raw)
    if options.config is not None:
        config = read_arguments(options.config)
    if not config:
        raise ValueError("The checkpoint has no config.json beside it: give the constructor arguments by --config.")
    family, (translated, tensors) = _translate(options, weights, config)
    # The tensors leave the memory one by one.
    weights.clear()
    own = families()[family].config_class(**translated)
    tokenizer = _tokenizer(options.tokenizer, own, config, options.trust_remote_code)
    names = {option.name for option in fields(own)} - ({"bos_token_id"} if own.bos_token_id is None else set())
    translated |= {name: value for name, value in token_options(tokenizer).items() if name in names}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # Large models have rows that are no token's.
        tensors[name] = tensors[name][: len(tokenizer)]
    model = load_translated(family, translated, tensors)
    export_model(model, tokenizer, options.output, {"base_model": options.checkpoint})
    say(f"{options.output} holds a {type(model).__name__} of {model.num_parameters():,} parameters. Next:")
    say(f"  xlm-hf family={model.config.model_type} task=TASK job=generate checkpoint={options.output}")


def _translate(options, weights: dict[str, Any], config: dict[str, Any]) -> tuple[str, Any]:
    """The family that is named, or else the only one that the tensors fit, and what `translate_checkpoint` returns."""
    known = [name for name, family in families().items() if options.source in family.converters]
    found, reasons = {}, {}
    for name in known if options.family is None else [options.family]:
        try:
            found[name] = translate_checkpoint(name, weights, config, options.source)
        except ValueError as error:
            reasons[name] = error
    if not found:
        raise ValueError(" ".join(f"As {name}: {reason}" for name, reason in reasons.items()))
    if len(found) > 1:
        raise ValueError(f"The tensors fit several families: add --family {' or --family '.join(found)}.")
    return next(iter(found.items()))


def _tokenizer(name: str | None, config: Any, arguments: dict[str, Any], trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint, which does not hold it, extended by what is the last id: the mask, or padding."""
    if name is None:
        if (arguments.get("padding_idx", 0), arguments.get("mask_idx")) != (0, 2):
            size = config.vocab_size
            raise ValueError(f"The checkpoint does not hold its tokenizer of {size} tokens: name it by --tokenizer.")
        name = _NUMBERS
    tokenizer = _extended(name, config, trust_remote_code)
    mask = getattr(config, "mask_token_id", None)
    if mask is not None and tokenizer.mask_token is None and mask < len(tokenizer):
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask)
    is_padded = config.backbone == "transformers" and len(tokenizer) < config.vocab_size
    facts = {} if is_padded else {"vocab_size": len(tokenizer)}
    # A checkpoint without a mask says nothing of its special tokens.
    roles = ("pad_token_id", "mask_token_id") if getattr(config, "mask_token_id", 0) < config.vocab_size else ()
    facts |= {role: getattr(tokenizer, role) for role in roles if hasattr(config, role)}
    for fact, value in facts.items():
        if value != getattr(config, fact):
            wanted = f"{fact} is {value} in the tokenizer {name} and {getattr(config, fact)} in the checkpoint"
            raise ValueError(f"{wanted}: name the one that it was trained with, special tokens added.")
    return tokenizer


def _extended(name: str, config: Any, trust_remote_code: bool) -> Any:
    """The tokenizer `name`, with the token that the last id of the configuration stands for."""
    if name == _NUMBERS:
        return number_tokenizer(config.vocab_size - len(NUMBER_TOKENS))
    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if len(tokenizer) == config.vocab_size - 1:
        if tokenizer.mask_token is None and getattr(config, "mask_token_id", None) == len(tokenizer):
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        elif tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
