"""A lattice parameter set can be used only with the estimate that docs/security-estimates.md gives for it."""

import dataclasses
import importlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.markdown import section, tables

from blindtune.protocol.lattice.parameters import (
    DEGREE,
    LATTICE_PARAMETER_SETS,
    MLWE1280,
    MLWE1536,
    LatticeParameters,
)
from blindtune.protocol.parameters import PARAMETER_SETS, Q24, Q31

ROOT = Path(__file__).parents[3]
SETS = list(LATTICE_PARAMETER_SETS.values())
FIGURES = {
    "samples": ("samples", 0),
    "β": ("block size", 0),
    "core-SVP, classical `0.292 β`": ("classical", 1),
    "core-SVP, quantum `0.265 β`": ("quantum", 1),
    "gates, uSVP": ("usvp", 1),
    "gates, BDD": ("bdd", 1),
}


def document(name: str = "security-estimates.md") -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def script(name: str = "security_estimate") -> ModuleType:
    """A file of benchmarks/, which is a command and no part of the package."""
    return importlib.import_module(f"benchmarks.security.{name}")


@cache
def estimate(dimension: int, eta: int, q: int) -> dict[str, float]:
    """What the script computes, once for all tests."""
    figures: dict[str, float] = script().estimate(script().Instance("", dimension, eta, q))
    return figures


def rows(text: str) -> list[dict[str, str]]:
    return next(tables(section(text, "Parameter sets")))


def parameters_in(row: dict[str, str]) -> tuple[int, int, int]:
    return int(row["n"]), int(row["η"]), int(row["q"])


def disagreements(text: str, sets: Iterable[LatticeParameters]) -> list[str]:
    """Where the table of parameter sets and the code's sets differ in name or in a parameter."""
    stated = {x[1]: row for row in rows(text) if (x := re.search(r"`([\w-]+)`", row["set"]))}
    coded = {x.name: x for x in sets}
    found = [f"{name} is in one place only" for name in sorted(set(stated) ^ set(coded))]
    for name in set(stated) & set(coded):
        row, x = stated[name], coded[name]
        pairs: dict[str, Any] = {"q": x.residues.modulus, "k": x.rank, "n": x.dimension, "η": x.eta}
        found += [f"{name}: {key} is {value}" for key, value in pairs.items() if row[key] != str(value)]
    return found


def wrong_figures(text: str) -> list[str]:
    """Where a figure of the table is not what the script computes for the row's parameters."""
    found = []
    for row in rows(text):
        figures = estimate(*parameters_in(row))
        for column, (key, digits) in FIGURES.items():
            if row[column] != f"{figures[key]:.{digits}f}":
                found.append(f"{row['set']}: {column} is {row[column]}, computed {figures[key]:.2f}")
    return found


def test_the_documented_parameter_sets_are_those_in_the_code() -> None:
    assert disagreements(document(), SETS) == []
    assert len(LATTICE_PARAMETER_SETS) == len({x.name for x in SETS}) >= 2
    assert all(name == x.name for name, x in LATTICE_PARAMETER_SETS.items())


def test_the_documented_ring_and_modulus_are_those_in_the_code() -> None:
    assert f"`Z_q[X]/(X^{DEGREE} + 1)` with q = {Q31.modulus}," in document()
    assert f"or q = {Q24.modulus} where" in document()
    assert {x.modulus for x in PARAMETER_SETS.values()} == {Q31.modulus, Q24.modulus}
    assert {x.residues.modulus for x in SETS} == {Q31.modulus, Q24.modulus}


def test_every_documented_figure_is_what_the_estimate_gives() -> None:
    assert wrong_figures(document()) == []


@pytest.mark.parametrize(
    "changed",
    [
        [dataclasses.replace(MLWE1280, eta=20), MLWE1536],
        [dataclasses.replace(MLWE1280, rank=4), MLWE1536],
        [dataclasses.replace(MLWE1280, name="mlwe1281"), MLWE1536],
        [MLWE1280, MLWE1536, dataclasses.replace(MLWE1280, name="mlwe1792", rank=7)],
        [MLWE1280],
    ],
    ids=["noise", "rank", "name", "a set without an estimate", "an estimate without a set"],
)
def test_a_parameter_that_changes_without_its_estimate_is_noticed(changed: list[LatticeParameters]) -> None:
    assert disagreements(document(), changed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 21 | 1402 |", "| 20 | 1402 |"),
        ("| 1402 |", "| 1403 |"),
        ("| 423 |", "| 424 |"),
        ("| **148.8** |", "| **149.8** |"),
        ("| 3329 |", "| 3331 |"),
    ],
)
def test_a_figure_that_changes_alone_in_the_document_is_noticed(old: str, new: str) -> None:
    text = document().replace(old, new)
    assert text != document()
    assert disagreements(text, SETS) or wrong_figures(text)


def test_the_script_estimates_what_the_document_lists() -> None:
    instances = list(script().instances())
    assert [(x.n, x.eta, x.q) for x in instances] == [parameters_in(row) for row in rows(document())]
    assert [x.name for x in instances[: len(SETS)]] == [x.name for x in SETS]
    for row in rows(document()):
        assert int(row["n"]) == DEGREE * int(row["k"])


def test_the_lattice_estimators_table_is_of_these_sets_and_close_to_the_script() -> None:
    """It was computed once; what changes alone in the code or in either table is noticed."""
    table = list(next(tables(section(document(), "With the lattice estimator"))))
    stated = {row["set"].strip("`"): row for row in table}
    coded = {x.name: (x.dimension, x.eta, x.residues.modulus) for x in SETS} | {"ML-KEM-512": (512, 3, 3329)}
    assert list(stated) == list(coded)
    for name, (dimension, eta, q) in coded.items():
        row, figures = stated[name], estimate(dimension, eta, q)
        assert (row["n"], row["η"]) == (str(dimension), str(eta))
        for column, key in (
            ("uSVP", "usvp"),
            ("BDD", "bdd"),
            ("core-SVP", "classical"),
            ("quantum", "quantum"),
        ):
            assert abs(float(row[column]) - figures[key]) <= 0.15, (name, column)


def test_algebraic_attacks_cost_what_the_document_says() -> None:
    text, command = section(document(), "With the lattice estimator"), script("lattice_estimator")
    assert command.MOST_SAMPLES == 1 << 23
    for row in next(tables(text)):
        cost = command.algebraic(int(row["n"]), int(row["η"]), command.MOST_SAMPLES)
        assert row["algebraic"] == ("> 1000" if cost >= command.ENOUGH else f"{cost:.0f}")
    for eta, log_samples, cost in ((2, 23, 751), (2, 26, 529), (1, 23, 135)):
        assert round(command.algebraic(1280, eta, 1 << log_samples)) == cost
        assert f"2^{cost}" in text
    assert round(command.algebraic(1280, 2, 1280**5)) == 89


def test_quoted_figures_agree_with_those_computed() -> None:
    for x in script().instances():
        for what, quoted in x.quoted.items():
            ours = estimate(x.n, x.eta, x.q)[what]
            assert abs(ours - quoted) <= (0.5 if quoted == int(quoted) else 0.25), (x.name, what)


@pytest.mark.parametrize(
    ("quoted", "instance", "keys"),
    [
        ("`mlwe1280`: 2^148.8 (BDD), 2^150.4 (uSVP)", "mlwe1280", ["bdd", "usvp"]),
        ("`mlwe1280`: core-SVP 2^124 and 2^112", "mlwe1280", ["classical", "quantum"]),
        ("`mlwe1536`: core-SVP 2^157 and 2^143", "mlwe1536", ["classical", "quantum"]),
        ("rank 4: 2^118 gates", "rejected: rank 4", ["bdd"]),
        ("η = 2: core-SVP 2^106", "rejected: rank 5, eta 2", ["classical"]),
        ("ML-KEM-512: 118.6; 143.8; 140.3", "ML-KEM-512", ["classical", "usvp", "bdd"]),
    ],
)
def test_the_table_of_quoted_figures_shows_what_is_compared(
    quoted: str, instance: str, keys: list[str]
) -> None:
    table = next(tables(section(document(), "Which of these figures were reproduced")))
    (row,) = [x for x in table if x["quoted"] == quoted]
    (x,) = [x for x in script().instances() if x.name == instance]
    stated = [float(number) for number in re.findall(r"(?:2\^|(?<=[:;] ))(\d+(?:\.\d+)?)", quoted)]
    assert stated == [x.quoted[key] for key in keys]
    ours = [f"{estimate(x.n, x.eta, x.q)[key]:.2f}" for key in keys]
    assert re.findall(r"\d+\.\d+", row["this script"]) == ours
    assert len(table) == 6


@pytest.mark.parametrize("x", SETS, ids=lambda x: x.name)
def test_what_a_set_says_of_its_own_strength_is_estimated(x: LatticeParameters) -> None:
    figures = estimate(x.dimension, x.eta, x.residues.modulus)
    assert f"Module-LWE of dimension {x.dimension}:" in x.security
    core = f"core-SVP 2^{figures['classical']:.0f} classical and 2^{figures['quantum']:.0f} quantum"
    assert core in x.security
    if gates := re.search(r"2\^(\d+) classical gates", x.security):
        assert int(gates[1]) == int(min(figures["bdd"], figures["usvp"]))


@pytest.mark.parametrize("x", SETS, ids=lambda x: x.name)
def test_the_protocol_quotes_the_same_estimate(x: LatticeParameters) -> None:
    figures = estimate(x.dimension, x.eta, x.residues.modulus)
    (line,) = [y for y in document("protocol.md").splitlines() if y.startswith(f"| `lattice`: `{x.name}`")]
    assert (
        f"rank {x.rank}; 2^{figures['bdd']:.1f} gates, core-SVP 2^{figures['classical']:.1f} classical, "
        f"2^{figures['quantum']:.1f} quantum; hint {x.residues.word_bytes * x.dimension:,} bytes" in line
    )
