"""Hints: verified before they are kept, bound to what they belong to, and checked before they are used."""

import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import save_checkpoint
from support.crashes import CrashRecorder
from support.lies import LIES, Rogue
from support.transports import LocalWorker, manifest_of

from blindtune.checkpoint import Checkpoint
from blindtune.client.cli import main
from blindtune.client.config.blind_config import BlindConfig, Operator
from blindtune.client.kit.hints import HintStore, hint_bytes
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.client.operators.messages import WorkRequest
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import TransportError
from blindtune.client.process.exit_codes import ExitCode
from blindtune.client.rounds import connect as connect_module
from blindtune.client.rounds.connect import connect
from blindtune.client.rounds.multiplier import RemoteMultiplier
from blindtune.errors import BlindtuneError, KitError, OperatorUnavailableError, ResourceError
from blindtune.protocol.expansion import expand
from blindtune.protocol.lattice.hint import pack_rows, packed_shape
from blindtune.protocol.lattice.parameters import DEGREE, MLWE1280, MLWE1536, LatticeParameters
from blindtune.protocol.masks import Share
from blindtune.protocol.multiplication.multiplier import Multiplier
from blindtune.protocol.parameters import Q31, ParameterSet
from blindtune.protocol.products import Product, backward_products, forward_products
from blindtune.protocol.residues import Centred, Residues
from blindtune.server.admission.limits import Limits
from blindtune.server.hooks import Multiplying

ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
OTHER_ATTENTION = [name.replace("layers.0", "layers.1") for name in ATTENTION]
HEAD = "lm_head.weight"
(FORWARD,) = forward_products(ATTENTION, 32)  # 64 outputs
(OTHER_GROUP,) = forward_products(OTHER_ATTENTION, 32)
(BACKWARD,) = backward_products(zip(ATTENTION, (32, 16, 16), strict=True))  # 32 outputs
(SQUARE,) = forward_products(["model.layers.0.self_attn.o_proj.weight"], 32)  # 32 outputs either way
(SQUARE_BACK,) = backward_products([("model.layers.0.self_attn.o_proj.weight", 32)])
(WIDE,) = forward_products([HEAD], 32)  # 99 outputs, no multiple of 16
PRODUCTS = [FORWARD, BACKWARD, SQUARE, SQUARE_BACK, WIDE]

ADDRESSES = ["127.0.0.1:7101", "127.0.0.1:7102"]
TOY = LatticeParameters(name="toy", rank=1, eta=2, security="none: a toy for tests")
BLOCKS = MLWE1280.dimension // DEGREE  # requests for one hint
PAGE = os.sysconf("SC_PAGESIZE")
HEADER = 4096

Connect = Callable[..., RemoteMultiplier]


@pytest.fixture
def kit(checkpoint: Checkpoint, tmp_path: Path) -> Kit:
    """A kit of the tiny model's without any hints."""
    shutil.copytree(cached_kit(checkpoint).folder, tmp_path / "kit", ignore=_without_hints)
    return Kit.open(tmp_path / "kit")


def _without_hints(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "hints"]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Connects in lattice mode, as a user's configuration does, to workers in this process."""

    def connect_to(kit: Kit, *workers: LocalWorker, parameter_set: str = "mlwe1280") -> RemoteMultiplier:
        transports = dict(zip(ADDRESSES, workers, strict=False))
        for worker in workers:
            worker.stated = worker.stated or manifest_of(kit)
        monkeypatch.setattr(
            connect_module, "GrpcTransport", lambda operator, address, insecure: transports[address]
        )
        config = BlindConfig(
            operators=[Operator("alpha", list(transports))],
            masking="lattice",
            parameter_set=parameter_set,
            insecure=True,
            retry_seconds=0,
        )
        return connect(config, kit)

    return connect_to


class Asked:
    """Obtains rows of hints from an honest worker, and counts."""

    def __init__(self, multiplier: Multiplying) -> None:
        self._multiplier = multiplier
        self.shares: list[tuple[Product, Share]] = []

    def __call__(self, product: Product, share: Share) -> Residues:
        self.shares.append((product, share))
        return self._multiplier.multiply(product, share.residues, Q31)


def _not_asked(product: Product, share: Share) -> Residues:
    pytest.fail(f"asked for a hint of {product.label}, which is there")


def _folder(kit: Kit, parameters: LatticeParameters = MLWE1280) -> Path:
    return kit.folder / "blindtune" / "hints" / parameters.name


def _names(kit: Kit, parameters: LatticeParameters = MLWE1280) -> set[str]:
    return {path.name for path in _folder(kit, parameters).iterdir()}


def _path(kit: Kit, product: Product, parameters: LatticeParameters = MLWE1280) -> Path:
    """The file of a product's hint, found by its header."""
    label = json.dumps(product.label)[1:-1]
    (found,) = [
        path
        for path in _folder(kit, parameters).glob("*.hint")
        if label.encode() in path.read_bytes()[:HEADER]
    ]
    return found


def _expected(kit: Kit, honest: Multiplier, product: Product) -> Centred:
    """H = A M, from the kit's public seed."""
    seed = (_folder(kit) / "public.seed").read_bytes()
    rows = honest.multiply(product, expand(seed, 0, MLWE1280.dimension, product.contraction, Q31), Q31)
    packed = np.empty(packed_shape(MLWE1280, rows.shape[1]), np.int32)
    pack_rows(rows, packed, 0, Q31)
    return packed


def _operand(product: Product, rows: int = 3) -> Centred:
    return np.random.default_rng(0).integers(-1000, 1001, (rows, product.contraction)).astype(np.int32)


# Processes that may die, or mount file systems.


def _in_a_child(work: Callable[[], Any], patience: float = 60) -> Any:
    """What ``work`` returns in a forked child; None if it died."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        writing.send(work())

    process = context.Process(target=run, daemon=True)
    process.start()
    writing.close()
    try:
        assert reading.poll(patience), "the child hangs"
        return reading.recv()
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def _with_mounts(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a child that may mount file systems, which nobody else sees."""

    def inside() -> Any:
        user, group = os.getuid(), os.getgid()
        namespaces = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS
        if ctypes.CDLL(None, use_errno=True).unshare(namespaces):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return work()

    return _in_a_child(inside)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where file systems can't be mounted."""
    folder = tmp_path_factory.mktemp("mount")

    def attempt() -> bool:
        try:
            _mount(folder, "size=1m")
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    if sys.platform != "linux" or not _with_mounts(attempt):
        pytest.skip("file systems can't be mounted here")


# What workers answer.


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_a_hint_is_caught_and_named_and_nothing_is_written(
    kit: Kit, honest: Multiplier, connected: Connect, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    liar = Rogue(honest)
    multiplier = connected(kit, LocalWorker(liar))
    liar.plan(lie, at=2, times=100)
    with pytest.raises(OperatorUnavailableError) as caught:
        multiplier.ready([FORWARD])
    for part in ("operator alpha: no worker is left", f"{ADDRESSES[0]}: gave a wrong answer"):
        assert part in str(caught.value)
    (error,) = [x.getMessage() for x in caplog.records if x.levelno >= logging.ERROR]
    assert f"worker {ADDRESSES[0]} of operator alpha gave a wrong answer" in error
    assert multiplier.statistics()["alpha"].lies == (ADDRESSES[0],)
    assert _names(kit) == {"public.seed"}
    # The next run, with an honest worker, makes it all over.
    worker = LocalWorker(honest)
    connected(kit, worker).ready([FORWARD])
    assert len(worker.requests) == BLOCKS
    assert np.array_equal(HintStore(kit, MLWE1280, _not_asked).get(FORWARD), _expected(kit, honest, FORWARD))


@pytest.mark.parametrize("lie", LIES)
def test_after_a_lie_about_a_hint_a_replica_gives_the_right_one(
    kit: Kit, honest: Multiplier, connected: Connect, lie: str
) -> None:
    liar, replica = Rogue(honest), LocalWorker(honest)
    worker = LocalWorker(liar)
    multiplier = connected(kit, worker, replica)
    liar.plan(lie, at=2, times=100)
    multiplier.ready([FORWARD, BACKWARD])
    assert multiplier.statistics()["alpha"].lies == (ADDRESSES[0],)
    assert liar.told == 1 and len(worker.requests) == 2, "a liar must not be asked again"
    assert len(replica.requests) == 2 * BLOCKS - 1
    store = HintStore(kit, MLWE1280, _not_asked)
    for product in (FORWARD, BACKWARD):
        assert np.array_equal(store.get(product), _expected(kit, honest, product))


class Insider:
    """Knows the first verification vector of each product, and answers so that it alone passes."""

    def __init__(self, honest: Multiplier, kit: Kit) -> None:
        self._honest, self._kit = honest, kit

    def outputs(self, product: Product) -> int:
        return self._honest.outputs(product)

    def multiply(self, product: Product, operand: Residues, parameters: ParameterSet) -> Residues:
        answer = self._honest.multiply(product, operand, parameters)
        s = self._kit.check_vectors(product, Q31).s[0].astype(object)
        answer[1, 0] = (int(answer[1, 0]) + s[1]) % Q31.modulus
        answer[1, 1] = (int(answer[1, 1]) - s[0]) % Q31.modulus
        return answer


def test_a_wrong_hint_that_passes_one_vector_fails_at_the_other(
    kit: Kit, honest: Multiplier, connected: Connect
) -> None:
    connected(kit, LocalWorker(honest)).ready([FORWARD])
    multiplier = connected(kit, LocalWorker(Insider(honest, kit)))
    # It does pass the single check of everyday responses ...
    multiplier.multiply_integers(_operand(FORWARD), FORWARD)
    assert multiplier.statistics()["alpha"].verified_responses == 1
    # ... and that of a hint has a second one.
    with pytest.raises(OperatorUnavailableError, match="gave a wrong answer: row 1 of 256"):
        multiplier.ready([OTHER_GROUP])
    assert len(list(_folder(kit).glob("*.hint"))) == 1


def test_requests_for_hints_carry_the_public_seed_and_ask_for_each_row_once(
    kit: Kit, honest: Multiplier, connected: Connect
) -> None:
    worker = LocalWorker(honest)
    connected(kit, worker).ready(PRODUCTS)
    seed = (_folder(kit) / "public.seed").read_bytes()
    for product in PRODUCTS:
        shares = [x.share for x in worker.requests if x.product == product]
        assert [x.seed and x.seed.key for x in shares] == [seed] * BLOCKS
        starts = [x.seed.row_offset for x in shares if x.seed]
        assert starts == list(range(0, MLWE1280.dimension, DEGREE))
        assert all(len(x.residues) == DEGREE for x in shares)
    assert len(worker.requests) == BLOCKS * len(PRODUCTS)


def test_a_hint_longer_than_a_worker_takes_is_asked_for_in_parts(
    kit: Kit, honest: Multiplier, connected: Connect
) -> None:
    worker = LocalWorker(honest, manifest_of(kit, Limits(max_rows=100)))
    connected(kit, worker).ready([FORWARD])
    # Three parts of about one size, rather than two full ones and a rest.
    assert {len(x.share.residues) for x in worker.requests} == {DEGREE // 3, DEGREE // 3 + 1}
    assert np.array_equal(HintStore(kit, MLWE1280, _not_asked).get(FORWARD), _expected(kit, honest, FORWARD))


def test_hints_are_there_before_the_first_operand_and_not_asked_for_again(
    kit: Kit, honest: Multiplier, connected: Connect
) -> None:
    worker = LocalWorker(honest)
    multiplier = connected(kit, worker)
    multiplier.ready(PRODUCTS)
    again = LocalWorker(honest)
    reconnected = connected(kit, again)
    reconnected.ready(PRODUCTS)
    assert again.requests == []
    for one, asked in ((multiplier, worker), (reconnected, again)):
        before = len(asked.requests)
        for product in PRODUCTS:
            result = one.multiply_integers(_operand(product), product)
            exact = honest.multiply(product, np.asarray(_operand(product) % Q31.modulus, np.uint32), Q31)
            bound = MLWE1280.noise(kit.column_absolute_sum(product))
            difference = (result - exact.astype(np.int64) + Q31.modulus // 2) % Q31.modulus - Q31.modulus // 2
            assert 0 < abs(difference).max() <= bound
        assert len(asked.requests) == before + len(PRODUCTS)


# What rots on disk.


def _replaced(start: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:start] + new + content[start + len(new) :]


def _flipped(where: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        at = where(content)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


def _in_digest(content: bytes, new: bytes) -> bytes:
    at = content.index(b"keyed_digest") + 20
    return _replaced(at, new)(content)


ROT: dict[str, Callable[[bytes], bytes]] = {
    "the header's first byte": _flipped(lambda content: 0),
    "a key of the header": _flipped(lambda content: content.index(b"fingerprint")),
    "the key of the digest": _flipped(lambda content: content.index(b"keyed_digest")),
    "the digest": lambda content: _in_digest(content, b"00000000"),
    "the digest, letters that are no ASCII": lambda content: _in_digest(content, "é".encode()),
    "the digest, bytes that are no text": lambda content: _in_digest(content, b"\xff"),
    "the padding's last byte": _flipped(lambda content: HEADER - 1),
    "a header of zeros": _replaced(0, bytes(HEADER)),
    "a header that is no object": _replaced(0, b"[]".ljust(HEADER)),
    "a header of brackets": _replaced(0, b"[" * HEADER),
    "an empty header": _replaced(0, b"{}".ljust(HEADER)),
    "the array's first byte": _flipped(lambda content: HEADER),
    "the array's middle": _flipped(lambda content: (HEADER + len(content)) // 2),
    "the array's last byte": _flipped(lambda content: len(content) - 1),
    "a page of the array": _replaced(2 * HEADER, bytes(4096)),
    "nothing but zeros": lambda content: bytes(len(content)),
    "an empty file": lambda content: b"",
    "half a header": lambda content: content[: HEADER // 2],
    "the header alone": lambda content: content[:HEADER],
    "a byte too few": lambda content: content[:-1],
    "a page too few": lambda content: content[:-4096],
    "a byte too many": lambda content: content + b"\0",
    "a page too many": lambda content: content + bytes(4096),
    "twice": lambda content: content * 2,
}


@pytest.fixture(scope="module")
def hint_file(
    checkpoint: Checkpoint, honest: Multiplier, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Kit, bytes]:
    """A kit with one toy hint, and its content."""
    folder = tmp_path_factory.mktemp("rot") / "kit"
    shutil.copytree(cached_kit(checkpoint).folder, folder, ignore=_without_hints)
    kit = Kit.open(folder)
    HintStore(kit, TOY, Asked(honest)).get(FORWARD)
    return kit, _path(kit, FORWARD, TOY).read_bytes()


@pytest.mark.parametrize("damage", ROT.values(), ids=ROT)
def test_a_hint_that_rotted_on_disk_is_refused_with_what_to_do(
    hint_file: tuple[Kit, bytes], damage: Callable[[bytes], bytes]
) -> None:
    kit, content = hint_file
    (path,) = _folder(kit, TOY).glob("*.hint")
    rotten = damage(content)
    assert rotten != content
    path.write_bytes(rotten)
    try:
        store = HintStore(kit, TOY, _not_asked)
        with pytest.raises(KitError) as caught:
            store.get(FORWARD)
        with pytest.raises(KitError):
            store.get(FORWARD)
    finally:
        path.write_bytes(content)
    assert f"hint {path} " in str(caught.value)
    assert "another :" not in str(caught.value), "what differs is named"
    assert f"delete {path}, and it is made again" in str(caught.value)
    assert HintStore(kit, TOY, _not_asked).get(FORWARD).any()


def test_no_flipped_bit_of_the_header_and_no_changed_word_of_the_array_goes_unnoticed(
    hint_file: tuple[Kit, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit, content = hint_file
    # In many parts, the last one shorter, as a hint of a large layer is.
    monkeypatch.setattr("blindtune.client.kit.hints._HASHED_AT_ONCE", 1000)
    assert HintStore(kit, TOY, _not_asked).get(FORWARD).any(), "which make no difference"
    (path,) = _folder(kit, TOY).glob("*.hint")
    generator = np.random.default_rng(0)
    header = content[:HEADER].rstrip()
    places = [(at, 1 << int(generator.integers(8))) for at in range(len(header) + 50)]
    places += [
        (int(at), int(bit)) for at, bit in generator.integers((HEADER, 1), (len(content), 256), (100, 2))
    ]
    places += [(HEADER, 1), (len(content) - 1, 128)]
    unnoticed = []
    try:
        for at, bits in places:
            path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
            try:
                HintStore(kit, TOY, _not_asked).get(FORWARD)
            except KitError:
                continue
            unnoticed.append((at, bits))
    finally:
        path.write_bytes(content)
    assert unnoticed == []


@pytest.mark.parametrize("product", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_rotten_hint_stops_a_run_before_anything_is_sent(
    kit: Kit, honest: Multiplier, connected: Connect, product: Product
) -> None:
    connected(kit, LocalWorker(honest)).ready(PRODUCTS)
    path = _path(kit, product)
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    worker = LocalWorker(honest)
    with pytest.raises(KitError, match=f"hint {path} is damaged"):
        multiplier = connected(kit, worker)
        multiplier.ready(PRODUCTS)
        multiplier.multiply_integers(_operand(product), product)
    assert worker.requests == []


def test_the_advice_for_a_damaged_hint_works(kit: Kit, honest: Multiplier, connected: Connect) -> None:
    connected(kit, LocalWorker(honest)).ready(PRODUCTS)
    path = _path(kit, FORWARD)
    path.write_bytes(b"rot")
    with pytest.raises(KitError) as caught:
        HintStore(kit, MLWE1280, _not_asked).get(FORWARD)
    assert f"delete {path}, and it is made again" in str(caught.value)
    path.unlink()
    worker = LocalWorker(honest)
    multiplier = connected(kit, worker)
    multiplier.ready(PRODUCTS)
    assert len(worker.requests) == BLOCKS
    assert multiplier.multiply_integers(_operand(FORWARD), FORWARD).shape == (3, 64)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_damaged_public_seed_is_refused_with_what_to_do(kit: Kit, honest: Multiplier, length: int) -> None:
    HintStore(kit, TOY, Asked(honest)).get(FORWARD)
    (_folder(kit, TOY) / "public.seed").write_bytes(bytes(length))
    with pytest.raises(KitError, match=f"delete the folder {_folder(kit, TOY)}, and hints are made again"):
        HintStore(kit, TOY, _not_asked)
    shutil.rmtree(_folder(kit, TOY))
    assert HintStore(kit, TOY, Asked(honest)).get(FORWARD).any()


def test_a_crash_while_hints_are_made_leaves_whole_ones_of_the_seed_that_is_there(
    kit: Kit, honest: Multiplier, tmp_path: Path
) -> None:
    with CrashRecorder(kit.folder) as disk:
        store = HintStore(kit, MLWE1280, Asked(honest))
        for product in (SQUARE, SQUARE_BACK):
            store.get(product)
            disk.promise(product)
    assert len(disk) > 10
    for number, crash in enumerate(disk):
        left = tmp_path / str(number)
        left.mkdir()
        crash.write_to(left)
        opened = Kit.open(left)
        for product in (SQUARE, SQUARE_BACK):
            ask = _not_asked if product in crash.promised else Asked(honest)
            hint = HintStore(opened, MLWE1280, ask).get(product)
            assert np.array_equal(hint, _expected(opened, honest, product)), str(crash)


def test_an_opened_hint_cannot_be_written_to(kit: Kit, honest: Multiplier) -> None:
    hint = HintStore(kit, TOY, Asked(honest)).get(FORWARD)
    assert isinstance(hint, np.memmap), "it is mapped, not read"
    with pytest.raises(ValueError, match="read-only"):
        hint[0, 0, 0, 0] = 1


# What belongs to something else.


def _moved(kit: Kit, source: Path, product: Product, parameters: LatticeParameters = MLWE1280) -> Path:
    """Puts a file in the place of a product's hint, for a kit that has one."""
    target = _path(kit, product, parameters)
    shutil.copyfile(source, target)
    return target


def _refusal(kit: Kit, product: Product, parameters: LatticeParameters = MLWE1280) -> str:
    with pytest.raises(KitError) as caught:
        HintStore(kit, parameters, _not_asked).get(product)
    return str(caught.value)


@pytest.fixture
def full_kit(kit: Kit, honest: Multiplier) -> Kit:
    """A kit with hints of some products under both parameter sets."""
    for parameters in (MLWE1280, MLWE1536):
        store = HintStore(kit, parameters, Asked(honest))
        for product in (FORWARD, OTHER_GROUP, BACKWARD, SQUARE, SQUARE_BACK):
            store.get(product)
    return kit


FOREIGN = {
    "another layer's": (FORWARD, OTHER_GROUP),
    "another group's, smaller": (FORWARD, SQUARE),
    "another group's, larger": (SQUARE, FORWARD),
    "the other direction's": (SQUARE, SQUARE_BACK),
    "the other direction's, smaller": (FORWARD, BACKWARD),
    "the other direction's, larger": (BACKWARD, FORWARD),
}


@pytest.mark.parametrize(("place", "source"), FOREIGN.values(), ids=FOREIGN)
def test_a_hint_of_another_product_is_refused_and_says_so(
    full_kit: Kit, place: Product, source: Product
) -> None:
    path = _moved(full_kit, _path(full_kit, source), place)
    refusal = _refusal(full_kit, place)
    assert f"hint {path} belongs to another" in refusal
    assert "product" in refusal and "fingerprint" not in refusal and "public_seed" not in refusal


@pytest.mark.parametrize(
    ("place", "source"), [(MLWE1280, MLWE1536), (MLWE1536, MLWE1280)], ids=["larger", "smaller"]
)
def test_a_hint_of_another_parameter_set_is_refused_and_says_so(
    full_kit: Kit, place: LatticeParameters, source: LatticeParameters
) -> None:
    path = _moved(full_kit, _path(full_kit, FORWARD, source), FORWARD, place)
    refusal = _refusal(full_kit, FORWARD, place)
    assert f"hint {path} belongs to another" in refusal
    assert "parameter_set" in refusal


def test_a_hint_of_another_model_of_the_same_shapes_is_refused_and_says_so(
    full_kit: Kit, honest: Multiplier, tmp_path: Path
) -> None:
    other = cached_kit(Checkpoint.open(save_checkpoint("llama", tmp_path / "model", seed=6)), tmp_path)
    # The same public seed, so that the model is all that differs.
    seed = _folder(full_kit) / "public.seed"
    _folder(other).mkdir(parents=True)
    shutil.copyfile(seed, _folder(other) / "public.seed")
    HintStore(other, MLWE1280, Asked(honest)).get(FORWARD)
    path = _moved(full_kit, _path(other, FORWARD), FORWARD)
    assert f"hint {path} belongs to another fingerprint: delete" in _refusal(full_kit, FORWARD)


def test_a_hint_made_with_another_public_seed_is_refused_and_says_so(
    full_kit: Kit, honest: Multiplier, tmp_path: Path
) -> None:
    other = Kit.open(Path(shutil.copytree(full_kit.folder, tmp_path / "other", ignore=_without_hints)))
    store = HintStore(other, MLWE1280, Asked(honest))
    store.get(FORWARD)
    path = _moved(full_kit, _path(other, FORWARD), FORWARD)
    assert f"hint {path} belongs to another public_seed: delete" in _refusal(full_kit, FORWARD)
    # The other way round: a new seed does not make old hints its own.
    (_folder(full_kit) / "public.seed").write_bytes(bytes(range(32)))
    assert "belongs to another public_seed" in _refusal(full_kit, BACKWARD)


def test_a_hint_of_a_kit_with_another_secret_is_refused(
    full_kit: Kit, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Whoever can write hints, but does not know the kit's secret, can't make one that is accepted."""
    again = cached_kit(checkpoint, tmp_path / "again")
    shutil.copytree(_folder(full_kit), _folder(again))
    assert "is damaged, its digest differs" in _refusal(again, FORWARD)


def test_a_header_that_claims_what_the_array_is_not_is_refused(full_kit: Kit) -> None:
    content = _path(full_kit, SQUARE_BACK).read_bytes()
    theirs = json.loads(content[:HEADER])
    path = _path(full_kit, SQUARE)
    ours = json.loads(path.read_bytes()[:HEADER])
    assert ours["binding"]["shape"] == theirs["binding"]["shape"]
    claim = json.dumps(ours | {"keyed_digest": theirs["keyed_digest"]}).encode().ljust(HEADER)
    path.write_bytes(claim + content[HEADER:])
    assert "is damaged, its digest differs" in _refusal(full_kit, SQUARE)


def test_every_kit_and_parameter_set_has_a_public_seed_of_its_own(
    kit: Kit, honest: Multiplier, tmp_path: Path
) -> None:
    other = Kit.open(Path(shutil.copytree(kit.folder, tmp_path / "other")))
    seeds = [HintStore(x, y, _not_asked).public_seed for x in (kit, other) for y in (MLWE1280, MLWE1536)]
    assert len(set(seeds)) == 4
    assert all(len(seed) == 32 for seed in seeds)
    assert HintStore(kit, MLWE1280, _not_asked).public_seed == seeds[0], "it is drawn once"


def test_hints_are_readable_by_their_owner_only(kit: Kit, honest: Multiplier) -> None:
    HintStore(kit, TOY, Asked(honest)).get(FORWARD)
    for path in _folder(kit, TOY).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# How much, and what is missing.


def test_sizes_are_told_beforehand_and_are_those_of_the_files(kit: Kit, honest: Multiplier) -> None:
    for parameters in (MLWE1280, MLWE1536):
        store = HintStore(kit, parameters, Asked(honest))
        told = store.total_bytes(PRODUCTS)
        for product in PRODUCTS:
            assert store.total_bytes([product]) == hint_bytes(parameters, kit.outputs(product))
            store.get(product)
        files = [path.stat().st_size - HEADER for path in _folder(kit, parameters).glob("*.hint")]
        assert sum(files) == told
        assert store.total_bytes([]) == 0
    # 1280 words for each output; outputs count in sixteens.
    assert hint_bytes(MLWE1280, 64) == 64 * 1280 * 4
    assert hint_bytes(MLWE1280, 99) == 112 * 1280 * 4
    assert hint_bytes(MLWE1536, 64) == 64 * 1536 * 4


def test_what_is_missing_is_what_is_not_on_disk(kit: Kit, honest: Multiplier) -> None:
    store = HintStore(kit, TOY, Asked(honest))
    assert store.missing(PRODUCTS) == PRODUCTS
    store.get(BACKWARD)
    rest = [x for x in PRODUCTS if x != BACKWARD]
    assert store.missing(PRODUCTS) == rest
    again = HintStore(kit, TOY, Asked(honest))
    assert again.missing(PRODUCTS) == rest
    again.get(WIDE)
    assert store.missing(PRODUCTS) == [x for x in rest if x != WIDE], "another process may make hints too"
    assert store.missing([BACKWARD, WIDE]) == []
    assert HintStore(kit, MLWE1280, _not_asked).missing(PRODUCTS) == PRODUCTS


def test_progress_shows_what_is_obtained_and_nothing_when_all_is_there(
    kit: Kit, honest: Multiplier, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = LocalWorker(honest, manifest_of(kit))
    monkeypatch.setattr(connect_module, "GrpcTransport", lambda *arguments: worker)
    config = BlindConfig(operators=[Operator("alpha", ADDRESSES[:1])], masking="lattice", insecure=True)
    shown: list[tuple[list[Product], int]] = []

    def progress(products: Any, size: int) -> Iterable[Product]:
        shown.append((list(products), size))
        return iter(products)

    connect(config, kit, progress).ready([FORWARD])
    multiplier = connect(config, kit, progress)
    multiplier.ready(PRODUCTS)
    multiplier.ready(PRODUCTS)
    rest = [x for x in PRODUCTS if x != FORWARD]
    assert shown == [
        ([FORWARD], hint_bytes(MLWE1280, 64)),
        (rest, sum(hint_bytes(MLWE1280, kit.outputs(x)) for x in rest)),
    ]


# Interruptions.


@pytest.mark.parametrize("request_number", [1, 3, BLOCKS, BLOCKS + 1, 2 * BLOCKS + 2])
def test_an_interruption_leaves_whole_hints_only_and_the_next_run_goes_on_there(
    kit: Kit, honest: Multiplier, connected: Connect, request_number: int
) -> None:
    def interrupt(request: WorkRequest) -> None:
        if len(worker.requests) == request_number:
            raise KeyboardInterrupt

    worker = LocalWorker(honest, before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        connected(kit, worker).ready(PRODUCTS)
    complete = (request_number - 1) // BLOCKS
    assert len(list(_folder(kit).glob("*.hint"))) == complete
    assert len(_names(kit)) == complete + 1, "hints, the seed, and nothing unfinished"
    again = LocalWorker(honest)
    connected(kit, again).ready(PRODUCTS)
    assert {x.product for x in again.requests} == set(PRODUCTS[complete:])
    assert len(again.requests) == BLOCKS * (len(PRODUCTS) - complete)
    store = HintStore(kit, MLWE1280, _not_asked)
    assert all(np.array_equal(store.get(x), _expected(kit, honest, x)) for x in PRODUCTS)


def test_an_interruption_while_a_hint_is_written_leaves_no_part_of_it(
    kit: Kit, honest: Multiplier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(honest)
    store = HintStore(kit, TOY, asked)

    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.get(FORWARD)
    assert _names(kit, TOY) == {"public.seed"}
    assert store.missing([FORWARD]) == [FORWARD]
    assert store.get(FORWARD).any()
    assert len(asked.shares) == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_killed_process_leaves_no_hint_that_is_not_whole(kit: Kit, honest: Multiplier) -> None:
    asked = Asked(honest)

    def die_at_the_third(product: Product, share: Share) -> Residues:
        if len(asked.shares) == 2:
            os.kill(os.getpid(), 9)
        return asked(product, share)

    def make() -> None:
        store = HintStore(kit, TOY, die_at_the_third)
        for product in PRODUCTS:
            store.get(product)

    assert _in_a_child(make) is None
    again = Asked(honest)
    store = HintStore(kit, TOY, again)
    assert store.missing(PRODUCTS) == PRODUCTS[2:]
    assert all(store.get(x).any() for x in PRODUCTS)
    assert [product for product, _ in again.shares] == PRODUCTS[2:]


def test_a_worker_that_is_gone_in_the_middle_is_one_error_and_the_hints_so_far_stay(
    kit: Kit, honest: Multiplier, connected: Connect
) -> None:
    def fail(request: WorkRequest) -> None:
        if len(worker.requests) > BLOCKS:
            raise TransportError(Failure.UNREACHABLE, "UNAVAILABLE: nobody is there")

    worker = LocalWorker(honest, before=fail)
    with pytest.raises(OperatorUnavailableError, match="nobody is there"):
        connected(kit, worker).ready(PRODUCTS)
    assert HintStore(kit, MLWE1280, _not_asked).missing(PRODUCTS) == PRODUCTS[1:]


# Several at the same time.


def test_threads_that_need_the_same_hint_ask_for_it_once(kit: Kit, honest: Multiplier) -> None:
    asked = Asked(honest)
    store = HintStore(kit, MLWE1280, asked)
    ready = threading.Barrier(4)

    def get(_: int) -> list[Centred]:
        ready.wait()
        return [store.get(product) for product in PRODUCTS]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(get, range(4)))
    assert len(asked.shares) == BLOCKS * len(PRODUCTS)
    assert all(a is b for result in results for a, b in zip(result, results[0], strict=True))
    assert all(
        np.array_equal(x, _expected(kit, honest, y)) for x, y in zip(results[0], PRODUCTS, strict=True)
    )


def test_runs_that_start_at_the_same_time_agree_on_a_public_seed(kit: Kit) -> None:
    rounds, runs = 100, 6
    ready = threading.Barrier(runs)

    def start(number: int) -> list[bytes | str]:
        seen: list[bytes | str] = []
        for attempt in range(rounds):
            ready.wait()
            try:
                parameters = LatticeParameters(f"toy {attempt}", 1, 2, "none")
                seen.append(HintStore(kit, parameters, _not_asked).public_seed)
            except Exception as error:
                seen.append(f"{type(error).__name__}: {error}")
        return seen

    with ThreadPoolExecutor(runs) as pool:
        seeds = list(pool.map(start, range(runs)))
    for one in zip(*seeds, strict=True):
        assert len(set(one)) == 1 and isinstance(one[0], bytes), one
    for attempt in range(rounds):
        folder = kit.folder / "blindtune" / "hints" / f"toy {attempt}"
        assert [path.name for path in folder.iterdir()] == ["public.seed"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_processes_that_make_the_same_hints_get_the_same_and_disturb_nobody(
    kit: Kit, honest: Multiplier
) -> None:
    HintStore(kit, MLWE1280, _not_asked)  # the seed is another test's matter
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)

    def make() -> list[str]:
        store = HintStore(kit, MLWE1280, Asked(honest))
        digests = []
        for product in PRODUCTS:
            ready.wait(30)
            digests.append(hashlib.sha256(store.get(product)).hexdigest())
        return digests

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: _in_a_child(make), range(3)))
    assert results[0] is not None and results[0] == results[1] == results[2]
    assert len(_names(kit)) == len(PRODUCTS) + 1
    store = HintStore(kit, MLWE1280, _not_asked)
    assert all(np.array_equal(store.get(x), _expected(kit, honest, x)) for x in PRODUCTS)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_child_forked_while_a_hint_is_obtained_does_not_hang(kit: Kit, honest: Multiplier) -> None:
    asked, asking, go_on = Asked(honest), threading.Event(), threading.Event()

    def slowly(product: Product, share: Share) -> Residues:
        if product == BACKWARD and threading.current_thread() is thread:
            asking.set()
            go_on.wait(60)
        return asked(product, share)

    store = HintStore(kit, TOY, slowly)
    store.get(FORWARD)
    thread = threading.Thread(target=store.get, args=(BACKWARD,))
    thread.start()
    try:
        assert asking.wait(60)
        assert _in_a_child(lambda: [bool(store.get(x).any()) for x in (FORWARD, BACKWARD)], 20) == [
            True,
            True,
        ]
    finally:
        go_on.set()
        thread.join()


def test_hints_are_not_made_for_a_kit_of_another_model_of_the_same_shapes(
    kit: Kit,
    honest: Multiplier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another revision, say. Whoever asked for its hints would go on to train another model."""
    other = save_checkpoint("llama", tmp_path / "other", seed=6)
    worker = LocalWorker(honest, manifest_of(kit))
    monkeypatch.setattr(connect_module, "GrpcTransport", lambda *arguments: worker)
    options = ["--output", str(kit.folder), "--hints", "--worker", ADDRESSES[0], "--insecure"]
    monkeypatch.setattr(sys, "argv", ["blindtune", "prepare", str(other), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.CONFIGURATION, capsys.readouterr().err
    assert "another model" in capsys.readouterr().err
    assert worker.requests == []


# Disks.


def _attempt(kit: Kit, ask: Callable[[Product, Share], Residues]) -> tuple[str, str]:
    """The error of making one hint, its type and message."""
    try:
        HintStore(kit, MLWE1280, ask).get(FORWARD)
    except BlindtuneError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return f"unexpected {type(error).__name__}", str(error)
    return "", ""


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_is_full_at_any_point_is_one_clear_error_and_leaves_whole_files_only(
    kit: Kit, honest: Multiplier, mounts: None
) -> None:
    hints = kit.folder / "blindtune" / "hints"
    hints.mkdir()
    needed = -(-hint_bytes(MLWE1280, 64) // PAGE) + 2  # with its header, and the seed

    def fill() -> list[tuple[int, str, str, list[str]]]:
        outcomes = []
        for options in [f"size={pages * PAGE}" for pages in (1, 2, 3, needed // 2, needed - 1)] + [
            f"size={needed * PAGE},nr_inodes={inodes}" for inodes in (1, 2, 3)
        ]:
            _mount(hints, options)
            outcomes.append((options, *_attempt(kit, Asked(honest)), _left(hints)))
            subprocess.run(["umount", hints], check=True)
        _mount(hints, f"size={needed * PAGE}")
        outcomes.append(("enough", *_attempt(kit, Asked(honest)), _left(hints)))
        return outcomes

    *full, enough = _with_mounts(fill)
    for options, error, message, left in full:
        assert error == ResourceError.__name__, (options, error, message)
        assert f"the disk that holds {hints}" in message and "is full" in message
        assert left in ([], ["public.seed"]), options
    assert enough[1:3] == ("", "")
    assert len(enough[3]) == 2


def _where_nobody_may_write(kit: Kit, ask: Callable[[Product, Share], Residues]) -> tuple[str, str]:
    hints = kit.folder / "blindtune" / "hints"
    kept = kit.folder.parent / "kept"
    shutil.copytree(hints, kept)
    _mount(hints, "size=16m")
    shutil.copytree(kept, hints, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", hints], check=True)
    return _attempt(kit, ask)


@pytest.mark.parametrize("seeded", [False, True], ids=["nothing", "a public seed"])
def test_a_folder_that_cannot_be_written_is_one_clear_error(
    kit: Kit, honest: Multiplier, mounts: None, seeded: bool
) -> None:
    (kit.folder / "blindtune" / "hints").mkdir()
    if seeded:
        HintStore(kit, MLWE1280, _not_asked)
    error, message = _with_mounts(partial(_where_nobody_may_write, kit, Asked(honest)))
    assert error and not error.startswith("unexpected"), (error, message)
    assert str(_folder(kit)) in message or str(_folder(kit).parent) in message


def test_complete_hints_are_used_from_a_folder_that_cannot_be_written(
    kit: Kit, honest: Multiplier, mounts: None
) -> None:
    HintStore(kit, MLWE1280, Asked(honest)).get(FORWARD)
    assert _with_mounts(partial(_where_nobody_may_write, kit, _not_asked)) == ("", "")
