"""Self-contained repositories: register a family, and export its code, weights, tokenizer and card."""

from transformers import AutoConfig, AutoModel  # noqa: F401


def register_family(config_class, model_class, auto_classes=("AutoModel",)):
    """Register."""
    import transformers
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name in auto_classes:
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
