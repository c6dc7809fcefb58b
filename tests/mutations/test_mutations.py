"""Every classical mistake still finds its place in the code, and is caught when it is made."""

from pathlib import Path

import pytest

from mutations.document import DOCUMENT, document
from mutations.hunt import hunt
from mutations.mutation import Edit, Mutation, check
from mutations.mutations import MUTATIONS
from mutations.workplace import ROOT, Outcome

# All of them take too long for one test; a sixth has some of every part.
SOME = MUTATIONS[::6]
THIS = "tests/mutations/test_mutations.py::test_the_table_fits_the_code"


def test_the_table_fits_the_code() -> None:
    assert len(MUTATIONS) >= 100
    assert check(MUTATIONS, ROOT) == []


def test_the_page_lists_all_mutations() -> None:
    """Which test caught a mistake is known only when all of them are run."""
    page = DOCUMENT.read_text()
    assert page.startswith(document([]))
    rows = page.removeprefix(document([])).splitlines()
    expected = [document([(x, "x::y")]).splitlines()[-1].rpartition(" | ")[0] for x in MUTATIONS]
    assert [row.rpartition(" | ")[0] for row in rows] == expected, 'run make mutations ARGS="--write"'


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (Mutation("m", "", (Edit("a.py", "x = 2", "x = 3"),), (THIS,)), "0 places in a.py"),
        (Mutation("m", "", (Edit("a.py", "x", "y"),), (THIS,)), "2 places in a.py"),
        (Mutation("m", "", (Edit("b.py", "x", "y"),), (THIS,)), "b.py cannot be read"),
        (Mutation("m", "", (Edit("a.py", "= 1", "= 2"),), ("a.py::test_gone",)), "no test a.py::test_gone"),
        (Mutation("m", "", (Edit("a.py", "= 1", "= 2"),), ()), "names no test"),
        (Mutation("m", "", (), (THIS,)), "changes nothing"),
    ],
)
def test_a_mutation_without_its_place_is_named(tmp_path: Path, mutation: Mutation, message: str) -> None:
    (tmp_path / "a.py").write_text("x = 1\nprint(x)\n")
    (problem, *_) = [x for x in check([mutation], tmp_path) if message in x]
    assert problem.startswith("m: ")


def test_only_a_failed_test_counts_as_caught() -> None:
    failed = ("tests/a.py::test_a",)
    assert Outcome(1, failed, "").caught
    # Passed, a fixture that broke, an import that failed, a wrong option, no tests, no end.
    assert not any(Outcome(status, (), "").caught for status in (0, 1, 2, 4, 5, None))
    assert not Outcome(2, failed, "").caught


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mistakes_are_caught() -> None:
    findings = hunt(SOME)
    missed = {x.mutation.id: x.verdict for x in findings if not x.outcome.caught}
    assert len(findings) == len(SOME)
    assert not missed
