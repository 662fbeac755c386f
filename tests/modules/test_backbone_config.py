"""What every family's configuration says of special tokens."""

import pytest

from xlm_hf.families import families
from xlm_hf.modeling.mlm import MLMConfig

LISTED = [0, 1, 2, 3, 4, 12]


@pytest.mark.parametrize("suppress_tokens", [None, LISTED])
@pytest.mark.parametrize("name", families())
def test_no_sequence_gets_a_mask_or_what_the_family_does_not_write(name, suppress_tokens):
    config = families()[name].config_class(vocab_size=20, suppress_tokens=suppress_tokens)
    written = {getattr(config, f"{role}_token_id") for role in config.written_specials}
    assert written <= {config.pad_token_id, getattr(config, "eos_token_id", None)}
    mask = {config.mask_token_id} if hasattr(config, "mask_token_id") else set()
    assert set(config.suppressed_ids) == ({*(suppress_tokens or ())} | mask) - written


@pytest.mark.parametrize("suppress_tokens", [None, LISTED])
def test_a_canvas_of_a_named_length_holds_no_end(suppress_tokens):
    config = MLMConfig(vocab_size=20, suppress_tokens=suppress_tokens, max_canvas_length=5)
    assert set(config.suppressed_ids) == {0, 2, 3, 4, *(suppress_tokens or ())}
