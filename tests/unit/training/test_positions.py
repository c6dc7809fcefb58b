"""The number of tokens that a model takes is what its configuration is understood to say."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from blindtune.client.training.positions import positions

pytestmark = pytest.mark.hf

LIMIT = 16
LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "context_length")
MOST_PARAMETERS = 10_000_000
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "d_embed"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_key_value_heads", "type_vocab_size"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_window"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "d_inner", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    "vocab_size": 99,
    "word_embed_proj_dim": 32,
    "eos_token_id": 2,
    "bos_token_id": 3,
}
# Padding has another number, so that what counts from it shows.
PADDING = 1


def small_config(kind: str) -> PretrainedConfig:
    """A configuration of a few parameters and 16 positions, as far as its fields have usual names."""
    cls = CONFIG_MAPPING[kind]
    known = {*cls().to_dict(), *getattr(cls, "attribute_map", {})}
    settings = {**SMALL, **dict.fromkeys(LIMITS, LIMIT), "pad_token_id": PADDING, "decoder_start_token_id": 2}
    return cls(**{name: value for name, value in settings.items() if name in known})


def small_model(name: str, config: PretrainedConfig) -> PreTrainedModel | None:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        parameters = sum(x.numel() for x in cls(config).parameters())
    return cls(config).eval() if parameters < MOST_PARAMETERS else None


def takes(model: Any, tokens: int) -> bool:
    ids = torch.full((1, tokens), 5)
    ids[:, -1] = 2  # some classify by what stands at the end of a text
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "name", "most"),
    [
        ("bert", "BertForSequenceClassification", LIMIT),
        ("distilbert", "DistilBertForSequenceClassification", LIMIT),
        ("roberta", "RobertaForSequenceClassification", LIMIT - PADDING - 1),
        ("xlm-roberta", "XLMRobertaForSequenceClassification", LIMIT - PADDING - 1),
        ("mpnet", "MPNetForSequenceClassification", LIMIT - PADDING - 1),
        ("longformer", "LongformerForSequenceClassification", LIMIT - PADDING - 1),
        ("prophetnet", "ProphetNetForCausalLM", LIMIT - PADDING - 2),
        ("gpt2", "GPT2LMHeadModel", LIMIT),
        ("opt", "OPTForCausalLM", LIMIT),
        ("mpt", "MptForCausalLM", LIMIT),
        ("trocr", "TrOCRForCausalLM", LIMIT),
    ],
)
def test_a_model_takes_as_many_tokens_as_it_has_positions_and_not_one_more(
    kind: str, name: str, most: int
) -> None:
    config = small_config(kind)
    assert positions(config) == most
    model = small_model(name, config)
    assert takes(model, most)
    assert not takes(model, most + 1)


def test_the_tokens_that_a_roberta_takes_depend_on_the_number_of_its_padding() -> None:
    config = small_config("roberta")
    config.pad_token_id = 0
    model = small_model("RobertaForSequenceClassification", config)
    assert positions(config) == LIMIT - 1
    assert takes(model, LIMIT - 1)
    assert not takes(model, LIMIT)


@pytest.mark.parametrize(("kind", "name"), [("xlnet", "XLNetLMHeadModel"), ("bloom", "BloomForCausalLM")])
def test_relative_positions_have_no_limit(kind: str, name: str) -> None:
    config = small_config(kind)
    assert positions(config) is None
    assert takes(small_model(name, config), 3 * LIMIT)


def test_a_model_with_several_parts_goes_by_its_text() -> None:
    config = CONFIG_MAPPING["gemma3"](text_config={"max_position_embeddings": 40})
    assert positions(config) == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES})
)
def test_every_text_architecture_takes_what_its_configuration_is_understood_to_say(kind: str) -> None:
    names = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    tried = 0
    for name in (x[kind] for x in names if kind in x):
        try:
            config = small_config(kind)
            model = small_model(name, config)
        except Exception as error:  # its sizes have names of its own, or depend on each other
            pytest.skip(f"no small one can be made: {type(error).__name__}")
        if model is None or not takes(model, 8):
            continue
        most = positions(config)
        tried += 1
        if most is None:
            assert takes(model, 3 * LIMIT), name
        else:
            # Rotary positions go on, and are no longer those of training.
            assert takes(model, most), name
            assert not takes(model, most + 1) or most == LIMIT, name
    if not tried:
        pytest.skip("no small one works without more than tokens")
