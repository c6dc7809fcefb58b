"""The constants of plans: what is measured is kept, and what is no calibration is refused."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

from blindtune.client.operators import operator
from blindtune.client.plan.costs import (
    ANSWERS_KEPT_BYTES,
    KEPT_BYTES,
    Link,
    Matrix,
    Protocol,
    kept_share,
    product_stages,
)
from blindtune.client.plan.profiles import (
    CPU_CLIENT,
    SHIPPED,
    Profile,
    calibrated_path,
    load_profile,
    profile_for,
    save_profile,
)
from blindtune.errors import ConfigurationError
from blindtune.protocol.lattice.parameters import MLWE1280
from blindtune.protocol.lattice.source import LatticeSource
from blindtune.protocol.parameters import Q31

SLOW = Profile(replace(CPU_CLIENT, name="slow", call=1.0), replace(SHIPPED["cpu"], name="slow", request=1.0))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLINDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_calibration_is_found_again_and_goes_before_what_is_shipped(cache: Path) -> None:
    assert profile_for(None, None) == Profile(CPU_CLIENT, SHIPPED["cpu"])
    save_profile(SLOW, calibrated_path())
    assert calibrated_path().is_relative_to(cache)
    assert profile_for(None, None) == SLOW
    assert profile_for(None, "h100") == Profile(SLOW.client, SHIPPED["h100"])


def test_client_and_worker_can_come_from_two_machines(cache: Path, tmp_path: Path) -> None:
    here = Profile(replace(CPU_CLIENT, name="here"), SHIPPED["cpu"])
    for name, profile in (("here", here), ("there", SLOW)):
        save_profile(profile, tmp_path / name)
    both = profile_for(tmp_path / "here", str(tmp_path / "there"))
    assert (both.client, both.worker) == (here.client, SLOW.worker)


def test_what_is_no_calibration_is_refused_and_the_reason_given(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ConfigurationError, match=r"profile\.json can't be read: No such file"):
        load_profile(path)
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"profile\.json is no calibration: .*Invalid JSON"):
        load_profile(path)
    save_profile(SLOW, path)
    whole = json.loads(path.read_text())
    for name, value in (
        ("flop", 0.0),
        ("moved", -1.0),
        ("call", "fast"),
        ("resident", None),
        ("spread", 0.5),
        ("parameter_set", "q16"),
    ):
        path.write_text(json.dumps(whole | {"client": whole["client"] | {name: value}}))
        with pytest.raises(ConfigurationError, match=rf"client\.{name}"):
            load_profile(path)
    old = {name: x for name, x in whole["client"].items() if name != "parameter_set"}
    path.write_text(json.dumps(whole | {"client": old}))
    with pytest.raises(
        ConfigurationError, match=r"client\.parameter_set: Field required; make it again with"
    ):
        load_profile(path)
    with pytest.raises(ConfigurationError, match=r"--worker-device is one of cpu, h100 or the file of"):
        profile_for(None, "abacus")


def test_the_shipped_gpu_takes_what_was_measured_of_it() -> None:
    worker = replace(SHIPPED["h100"], byte=0.0, request=0.0)
    for outputs, contraction, measured in ((28_672, 4096, 5.8e-3), (57_344, 8192, 12.8e-3)):
        stages = product_stages(
            Matrix(1024, contraction, outputs),
            Protocol(1, Q31, MLWE1280),
            Profile(CPU_CLIENT, worker),
            Link(1.0, 1.0, 0.0),
        )
        (seconds,) = [x.seconds for x in stages if x.resource == "workers"]
        assert seconds == pytest.approx(measured, rel=0.01)


def test_mask_rows_of_short_operands_are_shared_as_far_as_they_are_kept() -> None:
    few, many = [Matrix(64, 100, 100)], [Matrix(64, 100_000, 100_000)] * 100
    assert kept_share(few) == 1.0 and 0 < kept_share(many) < 0.1
    assert kept_share([Matrix(512, 10**6, 10**6)]) == 1.0, "whole blocks leave nothing over"
    client = replace(CPU_CLIENT, lattice_round=0, lattice_up=0, lattice_down=0, byte=0, request=0)
    profile = Profile(client, SHIPPED["cpu"])

    def seconds(rows: int, kept: float) -> float:
        stages = product_stages(Matrix(rows, 100, 100), Protocol(1, Q31, MLWE1280), profile, None, kept)
        return sum(x.seconds for x in stages if x.resource == "client")

    assert seconds(64, 1.0) == pytest.approx(seconds(256, 1.0) / 4)
    assert seconds(64, 0.0) == pytest.approx(seconds(256, 1.0))
    assert seconds(257, 0.0) == pytest.approx(2 * seconds(256, 1.0))
    assert seconds(257, 1.0) == pytest.approx(257 / 256 * seconds(256, 1.0))
    assert seconds(1000, 1.0) == pytest.approx(4 * seconds(256, 1.0)), "few are left over, and given up"
    assert kept_share([Matrix(1000, 10**6, 10**6)]) == 1.0


def test_the_memory_for_kept_rows_is_that_of_the_mask_source() -> None:
    assert inspect.signature(LatticeSource).parameters["kept_bytes"].default == KEPT_BYTES


def test_the_memory_for_kept_answers_is_that_of_an_operator() -> None:
    assert operator._KEPT_BYTES == ANSWERS_KEPT_BYTES
