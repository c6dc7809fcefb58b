"""Of an adapter out of other hands, plain LoRA is taken and nothing that loads files or code."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from blindtune.client.trust.adapter_config import read_plain_lora, require_plain_lora
from blindtune.errors import BlindtuneError, CheckpointError, UnsupportedError

PLAIN: dict[str, Any] = {**LoraConfig(target_modules=["q_proj"]).to_dict(), "peft_type": "LORA"}


def _written(folder: Path, **changes: object) -> Path:
    settings = {x: sorted(y) if isinstance(y, set) else y for x, y in {**PLAIN, **changes}.items()}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": 4, "rank_pattern": {"a": 2}, "use_rslora": True, "target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
        {"of_a_later_version": None, "another": {}, "switch": False},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},  # not followed here
    ],
)
def test_plain_lora_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read_plain_lora(_written(tmp_path, **changes))["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_config": {"a": 1}},
        {"megatron_core": "megatron.other"},
        {"use_dora": True},
        {"target_parameters": ["a"]},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": ["pissa"]},
        {"loftq_config": {"loftq_bits": 4}},
        {"eva_config": {"rho": 1.0}},
        {"of_a_later_version": "/home/me/file"},
        {"peft_type": "XLORA", "adapters": {"a": "someone/else"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": ["LORA"]},
    ],
)
def test_whatever_is_more_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="plain LoRA"):
        require_plain_lora(_written(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{}", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="adapter_config.json is damaged"):
        require_plain_lora(tmp_path)


def test_a_folder_without_an_adapter_is_somebody_elses_error(tmp_path: Path) -> None:
    require_plain_lora(tmp_path)
    with pytest.raises(BlindtuneError):
        read_plain_lora(tmp_path)
