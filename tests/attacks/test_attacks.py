"""Attacks succeed on masks that are known to be broken, and are left with chance on ours."""

import json
from pathlib import Path

import pytest
from attacks.expectations import EVERYTHING, MUST_SUCCEED, judged_private, rate

from blindtune.client.audit.lab import COLLUDING, PRIVATE, LabResult, run_lab
from blindtune.client.audit.report import as_json, as_markdown, plot
from blindtune.client.audit.weak_masks import WEAK_MASKS
from blindtune.client.audit.workloads import Sizes
from blindtune.client.config.blind_config import BlindConfig
from blindtune.errors import ConfigurationError

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("mask", MUST_SUCCEED)
def test_an_attack_breaks_every_mask_that_the_literature_says_it_breaks(
    small_lab: LabResult, mask: str
) -> None:
    rates = {attack: rate(small_lab, mask, attack) for attack in MUST_SUCCEED[mask]}
    assert {attack: x for attack, x in rates.items() if x <= 0.9} == {}


@pytest.mark.parametrize("mask", PRIVATE)
def test_no_attack_does_better_than_chance_on_our_masks(small_lab: LabResult, mask: str) -> None:
    judged = {attack: x for (name, attack), x in judged_private(small_lab).items() if name == mask}
    assert set(judged) == EVERYTHING
    assert {attack: x.score for attack, x in judged.items() if x.above_chance} == {}
    # Where guesses that know nothing are right at a known rate, fewer right ones would tell something too.
    for attack, x in judged.items():
        if attack.startswith("game") or attack in ("label by direction", "small differences"):
            assert x.low <= x.score.chance <= x.high, attack


def test_there_are_enough_trials_for_chance_to_mean_something(small_lab: LabResult) -> None:
    for (mask, attack), x in judged_private(small_lab).items():
        assert x.score.trials >= 30, (mask, attack)
        assert x.score.chance <= 0.5
        # What is reported as success elsewhere could not have been missed here.
        assert x.high < 0.9 or attack == "features by separation", (mask, attack)


def test_collusion_shows_as_the_failure_that_it_is(small_lab: LabResult) -> None:
    for attack in EVERYTHING:
        assert rate(small_lab, COLLUDING, attack) == pytest.approx(rate(small_lab, "none", attack), abs=0.05)


def test_what_leaks_is_reported(small_lab: LabResult) -> None:
    assert small_lab.leaks == []


@pytest.mark.parametrize("mask", [*WEAK_MASKS, "small_basis", "lab"])
def test_no_configuration_reaches_a_broken_mask(mask: str) -> None:
    with pytest.raises(ConfigurationError, match="masking is one of shares, lattice, reference"):
        BlindConfig(masking=mask)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole_lab(tmp_path_factory: pytest.TempPathFactory) -> LabResult:
    """What ``blindtune audit lab`` runs unless it is told otherwise."""
    return run_lab(tmp_path_factory.mktemp("whole lab"), Sizes(), rounds=600)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_lab_finds_what_it_must_and_nothing_else(whole_lab: LabResult) -> None:
    missed = {
        (mask, attack)
        for mask, attacks in MUST_SUCCEED.items()
        for attack in attacks
        if rate(whole_lab, mask, attack) <= 0.9
    }
    assert missed == set()
    leaks = {where: x.score for where, x in judged_private(whole_lab).items() if x.above_chance}
    assert leaks == {}


def test_the_report_has_every_figure_and_a_plot_that_can_be_opened(
    small_lab: LabResult, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    cells = json.loads(as_json(small_lab))["cells"]
    assert len(cells) == len(small_lab.cells) == 10 * 15
    table = as_markdown(small_lab).splitlines()
    assert len(table) == 2 + 15
    assert "| token by cosine | " in table[2]
    # Bold is what is above chance.
    above = sum(x["above_chance"] for x in cells)
    assert as_markdown(small_lab).count("**") == 2 * above > 0
    plot(small_lab, tmp_path / "attacks.png")
    with Image.open(tmp_path / "attacks.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
