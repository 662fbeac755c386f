"""A pretrained language model under a new model of a family: its sizes, its weights, its adapters."""

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xlm_hf.modules.transformer_backbone import add_adapters, language_model_class, take_embedding_and_head

logger = logging.getLogger(__name__)


def backbone_options(source: str, own: tuple[str, ...]) -> dict[str, Any]:
    """Options of a family's configuration for the backbone `source`, a folder or Hub id, or one of its `own`.

    Raises:
        ValueError: if there is no such language model.
    """
    if source in own:
        return {}
    try:
        config = AutoConfig.from_pretrained(source)
        if getattr(config, "backbone", None) == "transformers":
            # A model of a family here on such layers: a converted one, say.
            names = ("backbone", "backbone_config", "lm_head_bias", "tie_word_embeddings", "shift_logits")
            return {name: getattr(config, name) for name in names}
        head = _language_model(config).get_output_embeddings()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.backbone must be one of {', '.join(own)}, or a folder or Hub id of a language model of "
            f"transformers, and is {source!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    nested = {name: value for name, value in config.to_dict().items() if name not in ("dtype", "_name_or_path")}
    return {
        "backbone": "transformers",
        "backbone_config": nested,
        "lm_head_bias": head.bias is not None,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }


def _language_model(config: Any) -> Any:
    with torch.device("meta"):
        return language_model_class(config).from_config(config)


def load_backbone(model: PreTrainedModel, source: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give `model` the weights of the pretrained language model `source`.

    If the ids of `tokenizer` mean the same to both, embedding and head are copied. New ids start at the mean of the
    others. Otherwise both keep their initialisation.

    Returns:
        how many ids it knows.
    """
    pretrained: Any
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "backbone", None) == "transformers":
        whole: Any = AutoModel.from_pretrained(source, dtype=torch.float32)
        pretrained, embedding, head = whole.model.language_model, whole.model.embed_tokens, whole.lm_head
    else:
        pretrained = language_model_class(config).from_pretrained(source, dtype=torch.float32)
        embedding, head = take_embedding_and_head(pretrained)
    model.model.language_model.load_state_dict(pretrained.state_dict())
    shares = _shares_ids(source, tokenizer)
    if shares:
        for target, origin in ((model.model.embed_tokens, embedding), (model.lm_head, head)):
            for name, tensor in target.named_parameters():
                _take_rows(tensor, getattr(origin, name))
    logger.info("The backbone has the weights of %s, its vocabulary %s.", source, "too" if shares else "is new")
    return len(embedding.weight) if shares else 0


@torch.no_grad()
def _take_rows(target: nn.Parameter, origin: torch.Tensor) -> None:
    target[: len(origin)] = origin[: len(target)]
    target[len(origin) :] = origin.mean(dim=0)


def _shares_ids(source: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        vocabulary = AutoTokenizer.from_pretrained(source).get_vocab()
    except (OSError, ValueError):
        return False
    return vocabulary.items() <= tokenizer.get_vocab().items()


def check_directions(model: PreTrainedModel) -> None:
    """Raise ValueError unless the first state of the backbone depends on the last token, and the last on the first.

    Of a left-to-right model the first state must not depend on the last token.
    """
    ids = torch.zeros(3, 4, dtype=torch.int64)
    ids[1, -1], ids[2, 0] = 1, 1
    with torch.no_grad():
        states = copy.copy(model).eval().model(ids).last_hidden_state
    kind, is_causal = model.config.backbone_config["model_type"], model.model.is_causal
    last = 1 if model.config.shift_logits else 0
    if torch.equal(states[0, last], states[1, last]) != is_causal or torch.equal(states[0, -1], states[2, -1]):
        direction = "from left to right" if is_causal else "in both directions"
        raise ValueError(f"A {kind!r} cannot be made to see {direction}: choose another model.backbone.")


def add_lora(model: PreTrainedModel, options: dict[str, Any], known_ids: int) -> None:
    """Put adapters into the backbone of `model`, and freeze embedding and head too if it knows all their ids."""
    model.config.lora = dict(options)
    add_adapters(model.model.language_model, options)
    for module in (model.model.embed_tokens, model.lm_head):
        module.requires_grad_(model.config.vocab_size > known_ids)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its adapters added into the weights; the model itself, if it has none."""
    if not getattr(model.config, "lora", None):
        return model
    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(result.get_submodule(parent), child, module.get_base_layer())
    result.config.lora = None
    return result
