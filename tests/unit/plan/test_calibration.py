"""A calibration measures with the code that training runs, and every constant comes out as a time."""

from dataclasses import asdict
from pathlib import Path

import pytest

from blindtune.client.plan.calibration import calibrate, plausible
from blindtune.client.plan.measured_local import LocalRates, measure_local
from blindtune.client.plan.profiles import load_profile, save_profile
from blindtune.protocol.errors import ConfigurationError

pytestmark = pytest.mark.hf


def test_local_work_takes_time_for_calls_and_bytes() -> None:
    rates = measure_local(repeats=1)
    assert rates.call > 0 and rates.moved > 0
    assert 0 <= rates.flop < 1e-6 and 0 <= rates.half_flop < 1e-6
    assert 0 < rates.attended < 1e-3 and 0 < rates.half_attended < 1e-3


@pytest.mark.slow
def test_a_calibration_is_one_that_can_be_planned_with(tmp_path: Path) -> None:
    profile = calibrate()
    save_profile(profile, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    for side in (asdict(profile.client), asdict(profile.worker)):
        times = {name: x for name, x in side.items() if name not in ("name", "resident")}
        assert all(0 <= x < 0.1 for x in times.values())
    assert profile.client.shares_up > 0 and profile.client.lattice_block > 0
    assert profile.worker.operation > 0 and profile.worker.expanded > 0 and profile.worker.byte > 0
    assert profile.client.resident > 10 << 20


def rates(flop: float) -> LocalRates:
    return LocalRates(flop, half_flop=1e-12, moved=1e-10, call=0.0, attended=0.0, half_attended=0.0)


def test_a_measurement_that_shows_no_time_for_products_is_taken_again() -> None:
    taken = iter([rates(0.0), rates(3e-12)])
    assert plausible(lambda: next(taken)) == rates(3e-12)


def test_a_machine_that_is_too_busy_all_the_time_is_a_clear_error() -> None:
    taken = iter([rates(0.0)] * 3)
    with pytest.raises(ConfigurationError, match=r"too busy to be measured: .*products in float32.*again"):
        plausible(lambda: next(taken))
    assert next(taken, None) is None, "it gives up after three attempts, and not before"
