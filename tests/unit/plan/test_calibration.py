"""A calibration measures with the code that training runs, and every constant comes out as a time."""

import itertools
from dataclasses import asdict
from pathlib import Path

import pytest

from blindtune.client.config.parameter_sets import residue_set
from blindtune.client.plan import measured_local, measured_rounds
from blindtune.client.plan.calibration import calibrate, plausible
from blindtune.client.plan.costs import Matrix
from blindtune.client.plan.loopback import loopback
from blindtune.client.plan.measured_local import LocalRates, measure_local
from blindtune.client.plan.measured_memory import measure_memory
from blindtune.client.plan.measured_rounds import measure_rounds
from blindtune.client.plan.profiles import load_profile, save_profile
from blindtune.errors import ConfigurationError
from blindtune.protocol.parameters import PARAMETER_SETS, ParameterSet

pytestmark = pytest.mark.hf


def test_local_work_takes_time_for_calls_and_bytes() -> None:
    asked: list[int] = []
    rates = measure_local(asked.append, repeats=1)
    assert rates.call > 0 and rates.moved + rates.half_moved > 0
    assert 0 < rates.flop < 1e-6 and 0 < rates.half_flop < 1e-6
    assert 0 < rates.attended < 1e-2 and 0 < rates.half_attended < 1e-2
    # Of two layers' four groups, in both directions but for the first: once to count, twice to measure.
    assert asked.count(512) == 2 * 3 * (2 * 2 * 4 - 1)


def test_the_time_of_rounds_is_none_of_the_local_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def step() -> None:
        passes(1.0)
        rounds()
        passes(2.0)

    monkeypatch.setattr(measured_local, "perf_counter", lambda: now)
    rounds = measured_local._Rounds(lambda: passes(5.0))
    assert measured_local._median_seconds(step, 3, rounds.taken) == 3.0
    assert measured_local._median_seconds(step, 3) == 8.0


def test_memory_grows_by_no_less_than_what_is_held() -> None:
    use = measure_memory()
    assert 50 << 20 < use.resident < 8 << 30
    assert 1 <= use.spread < 10


@pytest.mark.parametrize("residues", PARAMETER_SETS.values(), ids=PARAMETER_SETS)
def test_passes_and_bytes_are_those_of_the_parameter_set(residues: ParameterSet) -> None:
    operation, byte, element = 1e-12, 1e-9, 1e-10
    matrices = [Matrix(*x) for x in itertools.product((16, 64, 256), (256, 2048), (512, 4096))]

    def samples(operators: int) -> list[measured_rounds._Sample]:
        """With operators, their bytes take time besides."""
        found = []
        for x in matrices:
            passes = 2 * residues.limbs * x.operand * x.outputs * operation
            sent = residues.word_bytes * (x.operand + operators * x.answer) * byte if operators else 0.0
            both = (x.operand + x.answer) * element  # expanded, and unmasked
            found.append(measured_rounds._Sample(x, passes + sent + both, passes, x.operand * element))
        return found

    found = measured_rounds._rates(samples(0), samples(0), samples(2), samples(1), residues)
    assert found.operation == pytest.approx(operation, rel=1e-3, abs=0)
    assert found.byte == pytest.approx(byte, rel=1e-3, abs=0)


def test_maskings_of_different_moduli_are_not_measured_together() -> None:
    with (
        pytest.raises(ConfigurationError, match=r"mlwe1280-q24 cannot .* q31: it is a lattice of q24"),
        loopback("q31", "mlwe1280-q24"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("shares", "lattice"), [("q31", "mlwe1536"), ("q24", "mlwe1024-q24")])
def test_rounds_are_measured_in_every_modulus(shares: str, lattice: str) -> None:
    with loopback(shares, lattice) as here:
        rates = plausible(lambda: measure_rounds(here, repeats=1))
        assert here.remote.source.parameters.name == shares and here.lattice.name == lattice
        assert (here.remote.certified is not None) == here.lattice.residues.certified
        if here.remote.certified is not None:
            found = here.remote.certified.certificates()
            # Under either mask: a certificate of anything but the product's integers would have ended it.
            assert found.scales and not found.wraps and not found.reasks
    assert 0 < rates.operation < 1e-6 and rates.shares_up > 0 and rates.lattice_block > 0


@pytest.mark.slow
def test_a_calibration_is_one_that_can_be_planned_with(tmp_path: Path) -> None:
    profile = calibrate()
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    for side in (asdict(profile.client), asdict(profile.worker)):
        times = {
            name: x for name, x in side.items() if name not in ("name", "parameter_set", "resident", "spread")
        }
        assert all(0 <= x < 0.1 for x in times.values())
    assert profile.client.shares_up > 0 and profile.client.lattice_block > 0
    assert profile.worker.operation > 0 and profile.worker.expanded > 0 and profile.worker.byte > 0
    assert profile.client.resident > 10 << 20
    assert profile.client.parameter_set == residue_set("shares", None).name


def rates(flop: float) -> LocalRates:
    return LocalRates(
        flop,
        half_flop=1e-12,
        moved=1e-10,
        half_moved=1e-10,
        call=0.0,
        shared=0.0,
        fresh=0.0,
        attended=0.0,
        half_attended=0.0,
    )


def test_a_measurement_that_shows_no_time_for_products_is_taken_again() -> None:
    taken = iter([rates(0.0), rates(3e-12)])
    assert plausible(lambda: next(taken)) == rates(3e-12)


def test_a_machine_that_is_too_busy_all_the_time_is_a_clear_error() -> None:
    taken = iter([rates(0.0)] * 3)
    with pytest.raises(ConfigurationError, match=r"too busy to be measured: .*products in float32.*again"):
        plausible(lambda: next(taken))
    assert next(taken, None) is None, "it gives up after three attempts, and not before"
