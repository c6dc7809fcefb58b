"""Kits: what is in them, what is not, and that a damaged one is never used."""

import json
import resource
import shutil
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.crashes import CrashRecorder
from support.transports import honest_multiplier
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.checkpoint import Checkpoint, FrozenLayer
from blindtune.client.kit.kit import Kit, is_kit
from blindtune.client.kit.prepare import cached_kit, prepare
from blindtune.errors import ConfigurationError, KitError
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import MAX_CONTRACTION, Product, backward_products, forward_products
from blindtune.protocol.residues import from_centred

HEAD = "lm_head.weight"
KIT_FILES = ["kit.json", "layers.safetensors", "verification.key"]
Damage = Callable[[bytes], bytes | None]


@pytest.fixture(scope="module")
def prepared(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "tiny"
    prepare(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose head has more outputs than one product may contract."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    config = LlamaConfig(
        vocab_size=MAX_CONTRACTION + 3000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(folder)


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys())


def test_a_crash_while_a_kit_is_written_leaves_a_whole_one_or_none(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for how, make in (
        ("prepared", lambda: prepare(checkpoint, tmp_path / "prepared" / "deep" / "kit")),
        ("cached", lambda: cached_kit(checkpoint, tmp_path / "cached")),
    ):
        (tmp_path / how).mkdir()
        with CrashRecorder(tmp_path / how) as disk:
            written = make().folder
            disk.promise("the kit")
        files = {x.relative_to(written): x.read_bytes() for x in written.rglob("*") if x.is_file()}
        assert len(disk) > 10
        for number, crash in enumerate(disk):
            left = tmp_path / f"{how}-{number}"
            left.mkdir()
            crash.write_to(left)
            kit = left / written.relative_to(tmp_path / how)
            assert kit.exists() or not crash.promised, str(crash)
            if kit.exists():
                found = {x.relative_to(kit): x.read_bytes() for x in kit.rglob("*") if x.is_file()}
                assert found == files, str(crash)


def test_a_kit_holds_no_frozen_weight(checkpoint: Checkpoint, prepared: Path) -> None:
    frozen = {layer.name for layer in checkpoint.layers}
    with safe_open(checkpoint.folder / "model.safetensors", framework="pt") as tensors:
        everything = set(tensors.keys())
        largest = max(tensors.get_tensor(name).numel() for name in frozen)
    assert _names(prepared) == everything - frozen
    with safe_open(prepared / "blindtune" / "layers.safetensors", framework="numpy") as arrays:
        assert max(arrays.get_tensor(name).size for name in arrays.keys()) < largest
    assert is_kit(prepared)
    assert not is_kit(checkpoint.folder)


def test_the_verification_secret_is_readable_by_its_owner_only(prepared: Path) -> None:
    inside = prepared / "blindtune"
    assert stat.S_IMODE(inside.stat().st_mode) == 0o700
    for name in ("verification.key", "layers.safetensors"):
        assert stat.S_IMODE((inside / name).stat().st_mode) == 0o600


def test_two_kits_of_one_checkpoint_have_different_secrets(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kits = [prepare(checkpoint, tmp_path / name) for name in ("a", "b")]
    secrets = {(kit.folder / "blindtune" / "verification.key").read_bytes() for kit in kits}
    assert len(secrets) == 2
    assert kits[0].description.fingerprint == kits[1].description.fingerprint


@pytest.mark.parametrize(("head", "kept"), [("local", True), ("remote", False), ("auto", False)])
def test_an_untied_head_stays_in_the_kit_only_when_it_is_computed_here(
    checkpoint: Checkpoint, tmp_path: Path, head: str, kept: bool
) -> None:
    kit = prepare(checkpoint, tmp_path / "kit", head)  # type: ignore[arg-type]
    assert (HEAD in _names(kit.folder)) == kept
    assert kit.description.head_included == kept
    assert kit.layers[HEAD].head


def test_a_tied_head_stays_in_the_kit_as_the_embedding(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    kit = prepare(Checkpoint.open(checkpoints["llama_tied"]), tmp_path / "kit", "remote")
    assert "model.embed_tokens.weight" in _names(kit.folder)


def _products(checkpoint: Checkpoint) -> list[Product]:
    layers = {layer.name: layer for layer in checkpoint.layers}
    attention = [
        name for name in layers if name.startswith("model.layers.0.self_attn") and "o_proj" not in name
    ]
    groups = [attention, [HEAD]]
    return [
        product
        for group in groups
        for product in (
            *forward_products(group, layers[group[0]].in_features),
            *backward_products((name, layers[name].out_features) for name in group),
        )
    ]


@pytest.mark.parametrize("size", ["tiny", "wide"])
def test_the_bounds_are_those_of_the_columns_of_every_product(
    checkpoint: Checkpoint, wide: Checkpoint, size: str
) -> None:
    checkpoint = {"tiny": checkpoint, "wide": wide}[size]
    kit = cached_kit(checkpoint)
    multiplier = honest_multiplier(checkpoint)
    with checkpoint.reader() as reader:
        scales = {layer.name: reader.read(layer).scales for layer in checkpoint.layers}
    assert all(np.array_equal(kit.scales(name), scales[name]) for name in kit.layers)
    for product in _products(checkpoint):
        matrix = _matrix(multiplier, product).astype(object)
        assert kit.column_square_sum(product) >= (matrix**2).sum(axis=0).max()
        assert kit.column_absolute_sum(product) >= abs(matrix).sum(axis=0).max()
        if len(product.spans) == 1:
            assert kit.column_square_sum(product) == (matrix**2).sum(axis=0).max()
            assert kit.column_absolute_sum(product) == abs(matrix).sum(axis=0).max()


def _matrix(multiplier: Multiplier, product: Product) -> np.ndarray:
    parts = [multiplier._layers[s.layer].numpy() for s in product.spans]
    if product.direction.name == "FORWARD":
        return np.concatenate(
            [part[:, s.start : s.stop].T for part, s in zip(parts, product.spans, strict=True)], axis=1
        )
    return np.concatenate([part[s.start : s.stop] for part, s in zip(parts, product.spans, strict=True)])


@pytest.mark.parametrize("size", ["tiny", "wide"])
def test_the_check_vectors_accept_the_right_product_and_no_other(
    checkpoint: Checkpoint, wide: Checkpoint, size: str
) -> None:
    checkpoint = {"tiny": checkpoint, "wide": wide}[size]
    kit, multiplier = cached_kit(checkpoint), honest_multiplier(checkpoint)
    generator = np.random.default_rng(0)
    for product in _products(checkpoint):
        operand = from_centred(
            generator.integers(-(10**9), 10**9, (3, product.contraction)).astype(np.int32), Q31
        )
        answer = multiplier.multiply(product, operand, Q31)
        check = kit.check_vectors(product, Q31)
        check.verify(operand, answer, vectors=2)
        answer[1, -1] ^= 1
        with pytest.raises(Exception, match="row 1 of 3"):
            check.verify(operand, answer)


@pytest.mark.parametrize("size", ["tiny", "wide"])
def test_certificate_words_of_a_product_are_those_of_its_matrix(
    checkpoint: Checkpoint, wide: Checkpoint, size: str
) -> None:
    checkpoint = {"tiny": checkpoint, "wide": wide}[size]
    kit, multiplier = cached_kit(checkpoint), honest_multiplier(checkpoint)
    for product in _products(checkpoint):
        matrix, words = (
            _matrix(multiplier, product).astype(np.int64).view(np.uint64),
            kit.certificate(product),
        )
        assert np.array_equal((matrix * words.u).sum(axis=1).astype(np.uint32), words.image)
        assert np.array_equal((matrix * words.long_u).sum(axis=1), words.long_image)
        assert np.array_equal((matrix * matrix).sum(axis=0), words.column_squares)
        assert len({*words.u.tolist()}) > 0.99 * len(words.u)
        assert kit.column_square_sum(product) == max(words.column_squares)


def test_an_output_folder_with_files_in_it_is_refused_and_left_alone(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        prepare(checkpoint, tmp_path / "kit")
    with pytest.raises(ConfigurationError, match="not empty"):
        prepare(checkpoint, tmp_path / "kit" / "notes.txt")
    assert [path.name for path in (tmp_path / "kit").iterdir()] == ["notes.txt"]


def test_an_empty_output_folder_is_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    assert prepare(checkpoint, tmp_path / "kit").layers
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]


@pytest.mark.parametrize("after", range(3))
def test_a_failure_in_the_middle_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, after: int
) -> None:
    def fail(layers: Iterable[FrozenLayer]) -> Iterable[FrozenLayer]:
        for index, layer in enumerate(layers):
            if index == after:
                raise RuntimeError("interrupted")
            yield layer

    with pytest.raises(RuntimeError, match="interrupted"):
        prepare(checkpoint, tmp_path / "kit", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large|os error 27"):
            prepare(checkpoint, tmp_path / "kit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_kit_is_made_once_even_by_several_at_the_same_time(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        kits = list(pool.map(lambda _: cached_kit(checkpoint, tmp_path), range(4)))
    assert len({kit.folder for kit in kits}) == 1
    secrets = {kit._secret for kit in kits}
    assert len(secrets) == 1, "all must have opened the one kit that stayed"
    (folder,) = (tmp_path / "kits").iterdir()
    again = cached_kit(checkpoint, tmp_path, progress=lambda layers: pytest.fail("made a second time"))
    assert again.folder == folder


def test_a_changed_checkpoint_gets_a_new_kit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint.folder, tmp_path / "model"))
    first = cached_kit(Checkpoint.open(copy), tmp_path)
    LlamaForCausalLM(LlamaConfig.from_pretrained(copy)).save_pretrained(copy)
    second = cached_kit(Checkpoint.open(copy), tmp_path)
    assert first.folder != second.folder
    assert first.description.fingerprint != second.description.fingerprint


DAMAGES: dict[str, Damage] = {
    "absent": lambda content: None,
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-9],
    "a bit flipped": lambda content: bytes([*content[:20], content[20] ^ 4, *content[21:]]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", KIT_FILES)
def test_a_damaged_kit_is_refused_with_the_command_that_makes_it_again(
    prepared: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    file = folder / "blindtune" / name
    content = damage(file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(KitError, match=f"blindtune prepare MODEL --output {folder}"):
        Kit.open(folder)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_kit_whose_model_is_damaged_is_refused(
    prepared: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    """Embeddings, norms, configuration and tokenizer decide what is trained, as the rest does."""
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    assert Kit.open(folder).layers, "what is hashed once is not taken for what it becomes"
    content = damage((folder / name).read_bytes())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(KitError, match=f"{name}.*blindtune prepare MODEL --output {folder}"):
        Kit.open(folder)


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "pytorch_model.bin", "model.safetensors.index.json", "modeling_x.py", "a/b"],
)
def test_a_kit_with_a_file_that_is_not_its_own_is_refused(prepared: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    (folder / ".DS_Store").touch()
    Kit.open(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(KitError, match=f"holds {name.split('/')[0]}, which is not its own.*: remove it"):
        Kit.open(folder)


def test_a_kit_that_an_earlier_release_made_is_to_be_made_again(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    file = folder / "blindtune" / "kit.json"
    earlier = {k: v for k, v in json.loads(file.read_text()).items() if k != "files"} | {"version": 1}
    file.write_text(json.dumps(earlier))
    with pytest.raises(KitError, match=r"another release \(version 1, this one reads 4\).*blindtune prepare"):
        Kit.open(folder)


def test_the_advice_for_a_damaged_kit_works(prepared: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It is read by somebody who follows it to the letter."""
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    (folder / "blindtune" / "verification.key").unlink()
    with pytest.raises(KitError) as caught:
        Kit.open(folder)
    if f"remove {folder}" in str(caught.value):
        shutil.rmtree(folder)
    prepare(checkpoint, folder)


def test_no_changed_value_in_the_description_goes_unnoticed(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    file = folder / "blindtune" / "kit.json"
    original = json.loads(file.read_text())
    name, layer = next(iter(original["layers"].items()))
    other = "0" * 64
    changes = {
        "fingerprint": original | {"fingerprint": other},
        "a layer's fingerprint": original
        | {"layers": original["layers"] | {name: layer | {"fingerprint": other}}},
        "a layer's shape": original | {"layers": original["layers"] | {name: layer | {"out_features": 8}}},
        "no files": original | {"files": {}},
        "another digest of a file": original | {"files": original["files"] | {"config.json": other}},
        "a layer less": original | {"layers": {k: v for k, v in original["layers"].items() if k != name}},
    }
    unnoticed = []
    for what, changed in changes.items():
        file.write_text(json.dumps(changed))
        try:
            Kit.open(folder)
        except KitError:
            continue
        unnoticed.append(what)
    assert unnoticed == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 5, "version"),
        ("version", "x", "version"),
        ("scheme", "nf4-v1", "is for nf4-v1, which is unknown here"),
        ("extra", 1, "extra"),
    ],
)
def test_a_kit_of_another_release_is_refused(
    prepared: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    file = folder / "blindtune" / "kit.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(KitError, match=message):
        Kit.open(folder)


def test_a_kit_that_rots_after_it_was_opened_is_refused_when_read(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "kit"))
    kit = Kit.open(folder)
    (folder / "blindtune" / "layers.safetensors").write_bytes(b"rot")
    with pytest.raises(KitError, match="cannot be opened"):
        kit.scales(HEAD)
    with pytest.raises(KitError, match="lacks scales of layer"):
        Kit.open(prepared).scales("no.such.layer")
