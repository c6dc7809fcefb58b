"""Secrets come from the operating system: never from a generator whose output can be foretold."""

import ast
import inspect
import os
from pathlib import Path

import pytest

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.hints import HintStore
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import prepare
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.masks import Share
from blindtune.protocol.products import Product
from blindtune.protocol.residues import Residues
from blindtune.protocol.shares.source import ShareSource

ROOT = Path(__file__).parents[3]
# Where secrets are made or used. Training, data and the audit have random numbers that protect nothing.
PLACES = [
    *(ROOT / "protocol").rglob("*.py"),
    *(ROOT / "checkpoint").rglob("*.py"),
    *(ROOT / "server").rglob("*.py"),
    *(ROOT / "client").glob("*.py"),
    *(ROOT / "client" / "operators").rglob("*.py"),
    *(ROOT / "client" / "record").rglob("*.py"),
]
GENERATORS = {"random", "default_rng", "randbytes", "getrandbits", "randint", "rand", "randn", "manual_seed"}
# Operands with which a worker tests its own hardware.
HARMLESS = {"protocol/multiplication/exactness.py"}


@pytest.mark.parametrize("source", [ShareSource, LatticeSource])
def test_masks_are_drawn_from_the_operating_system(source: type) -> None:
    assert inspect.signature(source).parameters["random_bytes"].default is os.urandom


def test_nobody_gives_a_source_other_randomness() -> None:
    sources = {"ShareSource": 2, "LatticeSource": 3}
    seen = 0
    for path in (ROOT / "client").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in sources:
                seen += 1
                assert "random_bytes" not in {keyword.arg for keyword in node.keywords}, path
                assert len(node.args) <= sources[node.func.id], path
    assert seen >= 2


def test_no_other_generator_is_near_secrets() -> None:
    found = set()
    for path in PLACES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            names = {
                ast.Import: lambda x: [alias.name for alias in x.names],
                ast.ImportFrom: lambda x: [x.module or "", *(alias.name for alias in x.names)],
                ast.Attribute: lambda x: [x.attr],
                ast.Name: lambda x: [x.id],
                ast.Constant: lambda x: [x.value] if isinstance(x.value, str) else [],
            }.get(type(node), lambda x: [])(node)
            if GENERATORS.intersection(part for x in names for part in x.split(".")):
                found.add(name)
    assert found == HARMLESS


def test_a_kits_secret_and_public_seed_come_from_the_operating_system(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[bytes] = []

    def watched(size: int, system: object = os.urandom) -> bytes:
        drawn.append(system(size))  # type: ignore[operator]
        return drawn[-1]

    def ask(product: Product, share: Share) -> Residues:
        raise AssertionError("no hint is needed")

    monkeypatch.setattr(os, "urandom", watched)
    kit: Kit = prepare(checkpoint, tmp_path / "kit")
    assert (kit.folder / "blindtune" / "verification.key").read_bytes() in drawn
    assert HintStore(kit, MLWE1280, ask).public_seed in drawn
