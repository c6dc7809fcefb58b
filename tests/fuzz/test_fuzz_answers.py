"""Answers of any bytes: the client takes the right one and refuses every other, soon and in little memory."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fuzzing import examples, refused_or_fine, require_plain, spoiled
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from support.transports import honest_multiplier, manifest_of

from blindtune.checkpoint import Checkpoint
from blindtune.client.config.blind_config import Operator
from blindtune.client.kit.kit import Kit
from blindtune.client.kit.prepare import cached_kit
from blindtune.client.operators.manifest import Expectations, check_manifest
from blindtune.client.operators.messages import WorkRequest, read_rows
from blindtune.client.operators.operator import OperatorClient
from blindtune.client.operators.policy import Failure
from blindtune.client.operators.transport import GrpcTransport, TransportError
from blindtune.errors import (
    BlindtuneError,
    IncompatibleWorkerError,
    OperatorUnavailableError,
    VerificationError,
)
from blindtune.proto import PROTOCOL_VERSION, worker_pb2
from blindtune.protocol.parameters import Q31
from blindtune.protocol.products import forward_products
from blindtune.protocol.shares.source import ShareSource
from blindtune.protocol.weights import INT8

LAYERS = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
(FORWARD,) = forward_products(LAYERS, 32)
OUTPUTS = 64
ROWS = 5
SECONDS = 20.0
MOST_MEMORY = 64 << 20
EVIL = "\x1b[2J\x07\r\nfake: all is well \u202e"

ANSWER = np.zeros((ROWS, OUTPUTS), np.uint32)

Response = worker_pb2.MultiplyResponse


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(checkpoints["llama"])


@pytest.fixture(scope="module")
def kit(checkpoint: Checkpoint) -> Kit:
    return cached_kit(checkpoint)


@pytest.fixture(scope="module")
def request_(kit: Kit) -> WorkRequest:
    operand = np.random.default_rng(1).integers(-(10**6), 10**6, (ROWS, 32)).astype(np.int32)
    share = ShareSource(2, Q31).hide_integers(operand, FORWARD).shares[1]
    return WorkRequest(kit.description.fingerprint, Q31.name, FORWARD, share, OUTPUTS)


@pytest.fixture(scope="module")
def right(checkpoint: Checkpoint, request_: WorkRequest) -> list[bytes]:
    """The right answer's messages."""
    answer = honest_multiplier(checkpoint).multiply(FORWARD, request_.share.residues, Q31)
    return [Response(residues=x.tobytes()).SerializeToString() for x in (answer[:2], answer[2:])]


def expectations(kit: Kit) -> Expectations:
    layers = {name: layer.fingerprint for name, layer in kit.layers.items()}
    return Expectations("tiny", kit.description.fingerprint, Q31.name, layers)


@st.composite
def answers(draw: st.DrawFn, right: list[bytes]) -> list[bytes]:
    messages = list(right)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(messages)))
        match draw(st.sampled_from(["spoil", "drop", "repeat", "shuffle", "words", "made up"])):
            case "spoil" if at < len(messages):
                messages[at] = draw(spoiled(st.just(messages[at])))
            case "drop":
                del messages[at : at + 1]
            case "repeat":
                messages[at:at] = messages[at : at + 1]
            case "shuffle":
                messages = draw(st.permutations(messages))
            case "words":
                words = draw(st.sampled_from([Q31.modulus, Q31.modulus + 1, 2**32 - 1, 0]))
                rows = np.full((draw(st.integers(1, ROWS)), OUTPUTS), words, "<u4")
                messages[at : at + 1] = [Response(residues=rows.tobytes()).SerializeToString()]
            case _:
                messages.insert(at, draw(st.binary(max_size=20)))
    return messages


def test_an_answer_is_the_right_one_or_fails_its_check(
    kit: Kit, request_: WorkRequest, right: list[bytes]
) -> None:
    expected = b"".join(Response.FromString(x).residues for x in right)
    check_vectors = kit.check_vectors(FORWARD, Q31)

    @examples(300)
    @given(stream=answers(right))
    @example(stream=right)
    def check(stream: list[bytes]) -> None:
        answer = ANSWER.copy()
        try:
            for _ in read_rows(request_, stream, answer):
                pass
            check_vectors.verify(request_.share.residues, answer, 1)
        except DecodeError:
            with pytest.raises(DecodeError):
                for message in stream:
                    Response.FromString(message)
        except VerificationError as error:
            require_plain(str(error))
            assert stream != right
        else:
            assert answer.tobytes() == expected

    check()


@pytest.mark.parametrize("size", [0, 1, 4 * OUTPUTS - 4])
def test_messages_without_whole_rows_end_an_endless_answer(request_: WorkRequest, size: int) -> None:
    with pytest.raises(VerificationError, match="whole rows"):
        list(read_rows(request_, repeat(Response(residues=b"\0" * size).SerializeToString()), ANSWER.copy()))


def test_a_manifest_is_the_right_one_or_refused(kit: Kit) -> None:
    expected = expectations(kit)
    valid = manifest_of(kit).SerializeToString()

    @st.composite
    def manifests(draw: st.DrawFn) -> worker_pb2.Manifest:
        manifest = manifest_of(kit)
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(["model", "scheme", "fingerprint", "software_version"]))
            match draw(st.sampled_from(["text", "versions", "layer", "limits", "sets"])):
                case "text":
                    setattr(manifest, name, draw(st.sampled_from([EVIL, EVIL * 1000, "", "é"])))
                case "versions":
                    manifest.protocol_versions[:] = draw(
                        st.lists(st.sampled_from([0, PROTOCOL_VERSION, 2**32 - 1])) | st.just([7] * 100_000)
                    )
                case "layer":
                    layer = manifest.layers[draw(st.integers(0, len(manifest.layers) - 1))]
                    setattr(layer, draw(st.sampled_from(["name", "fingerprint"])), EVIL)
                case "limits":
                    manifest.limits.max_rows = draw(st.sampled_from([0, 1, 2**32 - 1]))
                    manifest.limits.max_operand_bytes = draw(st.sampled_from([0, 1, 2**64 - 1]))
                case _:
                    manifest.parameter_sets[:] = [EVIL] * 1000
        return manifest

    def decoded(data: bytes) -> worker_pb2.Manifest:
        try:
            return worker_pb2.Manifest.FromString(data)
        except DecodeError:
            return worker_pb2.Manifest()

    @examples(200)
    @given(manifest=manifests() | spoiled(st.just(valid)).map(decoded))
    def check(manifest: worker_pb2.Manifest) -> None:
        with refused_or_fine(most=2000):
            check_manifest(manifest, expected, "worker 127.0.0.1:1 of operator alpha")
            assert manifest.fingerprint == expected.fingerprint
            assert manifest.scheme == INT8.identifier

    check()


class HostileServer:
    """A server of raw bytes in a process of its own, and a client that trusts it with a request."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.address = f"127.0.0.1:{int(process.stdout.readline())}"
        self._channel = grpc.insecure_channel(self.address)
        self._plan = self._channel.unary_unary("/hostile/Plan")

    def plan(
        self,
        messages: list[bytes],
        forever: bool = False,
        code: int = 0,
        details: str = "",
        trailing: list[tuple[str, str]] | None = None,
    ) -> None:
        plan = {
            "messages": [x.hex() for x in messages],
            "forever": forever,
            "code": code,
            "details": details,
            "trailing": trailing or [],
        }
        self._plan(json.dumps(plan).encode(), timeout=SECONDS)

    def client(self, kit: Kit) -> OperatorClient:
        transport = GrpcTransport(Operator("alpha", [self.address]), self.address, insecure=True)
        return OperatorClient(1, "alpha", [(self.address, transport)], expectations(kit), 0.0, SECONDS)

    def close(self) -> None:
        self._channel.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileServer]:
    program = Path(__file__).with_name("hostile_server.py")
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        server = HostileServer(process)
        yield server
        server.close()
        process.communicate()


def refusal(act: Callable[[], Any]) -> BlindtuneError:
    """The error of an act, which must come in little memory and can be shown."""
    tracemalloc.start()
    try:
        with pytest.raises((OperatorUnavailableError, IncompatibleWorkerError)) as caught:
            act()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    require_plain(str(caught.value), most=2000)
    assert peak < MOST_MEMORY, peak
    return caught.value


def test_the_hostile_server_can_tell_the_truth(
    kit: Kit, request_: WorkRequest, right: list[bytes], hostile: HostileServer
) -> None:
    client = hostile.client(kit)
    hostile.plan([manifest_of(kit).SerializeToString()])
    client.connect()
    hostile.plan(right)
    answer = client.multiply(request_, kit.check_vectors(FORWARD, Q31))
    assert answer.tobytes() == b"".join(Response.FromString(x).residues for x in right)
    client.close()


ROW = Response(residues=b"\1" * 4 * OUTPUTS).SerializeToString()
UNKNOWN = b"\x7a\x80\x80\x40" + b"x" * (1 << 20)  # a field that nobody knows, of a megabyte


@pytest.mark.parametrize("message", [b"", ROW, UNKNOWN, Response(residues=b"x").SerializeToString()])
def test_an_endless_answer_is_a_lie_and_not_a_timeout(
    kit: Kit, request_: WorkRequest, hostile: HostileServer, message: bytes
) -> None:
    hostile.plan([message], forever=True)
    client = hostile.client(kit)
    refusal(lambda: client.multiply(request_, kit.check_vectors(FORWARD, Q31)))
    assert client.statistics.lies == (hostile.address,)
    client.close()


@pytest.mark.parametrize("message", [b"\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\0" * (5 << 20)])
def test_bytes_that_are_no_message_are_no_answer(
    kit: Kit, request_: WorkRequest, hostile: HostileServer, message: bytes
) -> None:
    hostile.plan([message], forever=True)
    client = hostile.client(kit)
    refusal(client.connect)
    refusal(lambda: client.multiply(request_, kit.check_vectors(FORWARD, Q31)))
    client.close()


def test_any_answer_of_a_server_is_right_or_refused(
    kit: Kit, request_: WorkRequest, right: list[bytes], hostile: HostileServer
) -> None:
    vectors = kit.check_vectors(FORWARD, Q31)
    expected = b"".join(Response.FromString(x).residues for x in right)

    @examples(60)
    @given(stream=answers(right))
    def check(stream: list[bytes]) -> None:
        hostile.plan(stream)
        client = hostile.client(kit)
        try:
            assert client.multiply(request_, vectors).tobytes() == expected
        except OperatorUnavailableError as error:
            require_plain(str(error), most=2000)
        finally:
            client.close()

    check()


@pytest.mark.parametrize("code", [x.value[0] for x in grpc.StatusCode if x.value[0]])
def test_a_status_is_shown_without_what_steers_a_terminal(
    kit: Kit, request_: WorkRequest, hostile: HostileServer, code: int
) -> None:
    transport = GrpcTransport(Operator("alpha", [hostile.address]), hostile.address, insecure=True)
    for details in (EVIL, "\u202e" * 1500, "x" * 1_000_000):
        hostile.plan([], code=code, details=details, trailing=[("x-evil", "\x7e" * 100)])
        with pytest.raises(TransportError) as caught:
            transport.manifest(SECONDS)
        require_plain(str(caught.value), most=500)
        assert isinstance(caught.value.failure, Failure)
        with pytest.raises(TransportError) as caught:
            list(transport.multiply(request_, SECONDS, ANSWER.copy()))
        require_plain(str(caught.value), most=500)
    transport.close()
