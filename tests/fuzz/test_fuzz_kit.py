"""Kits and hints of any bytes: whole, or one error that names the file and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import dumped, examples, refused_or_fine, spoiled, spoiled_json
from hypothesis import example, given
from hypothesis import strategies as st
from support.transports import honest_multiplier

from blindtune.checkpoint import Checkpoint
from blindtune.client.kit.hints import HintStore
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.errors import KitError
from blindtune.protocol.lattice.parameters import LatticeParameters
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products

TOY = LatticeParameters(name="toy", rank=1, eta=2, security="none: a toy for tests")
(PRODUCT,) = forward_products(["model.layers.0.self_attn.k_proj.weight"], 32)
HEADER = 4096


def never(*_: object) -> np.ndarray:
    raise AssertionError("asked an operator")


@pytest.fixture(scope="module")
def kit(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A kit of its own, which these tests spoil, with one hint in it."""
    checkpoint = Checkpoint.open(checkpoints["llama"])
    folder = tmp_path_factory.mktemp("spoiled") / "kit"
    # Hints of other tests may lie in the kit that they share.
    shutil.copytree(cached_kit(checkpoint).folder, folder, ignore=shutil.ignore_patterns("hints"))
    kit = Kit.open(folder)
    honest = honest_multiplier(checkpoint)
    HintStore(kit, TOY, lambda product, share: honest.multiply(product, share.residues, Q31)).get(PRODUCT)
    return kit


def spoil(
    path: Path, strategy: Callable[[bytes], st.SearchStrategy[bytes]], read: Callable[[], object], count: int
) -> None:
    """Puts spoiled bytes in a file's place, and what was there back in the end."""
    valid = path.read_bytes()

    @examples(count)
    @given(content=strategy(valid))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with refused_or_fine(path.parent if path.suffix == ".key" else None):
            read()
            # Nothing but other spaces in JSON could go unnoticed.
            assert content == valid or (path.suffix != ".safetensors" and path.suffix != ".key")

    try:
        check()
    finally:
        path.write_bytes(valid)


def json_or_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    content = json.loads(valid)
    return spoiled_json(content).map(dumped) | spoiled(st.just(valid)) | st.binary(max_size=100)


def any_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    return spoiled(st.just(valid)) | st.binary(max_size=100)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("kit.json", json_or_bytes), ("verification.key", any_bytes), ("layers.safetensors", any_bytes)],
)
def test_a_spoiled_kit_is_refused(
    kit: Kit, name: str, strategy: Callable[[bytes], st.SearchStrategy[bytes]]
) -> None:
    path = kit.folder / "blindtune" / name

    def read() -> None:
        assert Kit.open(kit.folder).description == kit.description

    spoil(path, strategy, read, 100)


def test_a_digest_that_is_no_text_of_a_digest_is_refused(kit: Kit) -> None:
    path = kit.folder / "blindtune" / "kit.json"
    valid = path.read_bytes()
    path.write_bytes(json.dumps(json.loads(valid) | {"keyed_digest": "é"}).encode())
    try:
        with pytest.raises(KitError, match="its digest differs"):
            Kit.open(kit.folder)
    finally:
        path.write_bytes(valid)


def test_a_spoiled_hint_is_refused(kit: Kit) -> None:
    (path,) = kit.folder.rglob("*.hint")
    valid = path.read_bytes()
    expected = np.frombuffer(valid[HEADER:], np.int32)
    header = json.loads(valid[:HEADER])

    @examples(200)
    @given(
        content=spoiled(st.just(valid))
        | spoiled(st.just(valid[:HEADER])).map(lambda x: x + valid[HEADER:])
        | spoiled_json(header).map(lambda x: dumped(x).ljust(HEADER) + valid[HEADER:])
        | st.binary(max_size=100)
    )
    @example(content=b"")
    @example(content=valid[:HEADER])
    @example(content=dumped(header | {"keyed_digest": "é"}).ljust(HEADER) + valid[HEADER:])
    def check(content: bytes) -> None:
        # A new file: one that is mapped already must not shrink.
        path.unlink()
        path.write_bytes(content)
        with refused_or_fine(path):
            hint = HintStore(kit, TOY, never).get(PRODUCT)  # type: ignore[arg-type]
            assert np.array_equal(hint.reshape(-1), expected)

    try:
        check()
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 33])
def test_a_public_seed_of_another_length_is_refused(kit: Kit, content: bytes) -> None:
    (path,) = kit.folder.rglob("public.seed")
    valid = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(KitError, match="public.seed is damaged"):
            HintStore(kit, TOY, never)  # type: ignore[arg-type]
    finally:
        path.write_bytes(valid)
