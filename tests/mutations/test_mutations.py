"""Every classical mistake still finds its place in the code, and is caught when it is made."""

import importlib.util
import json
from pathlib import Path

import pytest

from mutations.document import DOCUMENT, document
from mutations.executed import executed_by_training
from mutations.hunt import hunt
from mutations.mutation import Edit, Mutation, check, check_paths
from mutations.mutations import MUTATIONS
from mutations.planted_code import CANNOT_RUN, PLANTED, pytest_exception_interact
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
        (
            Mutation("m", "", (Edit("a.py", "= 1", "= 2"),), (THIS,), "elsewhere"),
            "there is no path elsewhere",
        ),
    ],
)
def test_a_mutation_without_its_place_is_named(tmp_path: Path, mutation: Mutation, message: str) -> None:
    (tmp_path / "a.py").write_text("x = 1\nprint(x)\n")
    (problem, *_) = [x for x in check([mutation], tmp_path) if message in x]
    assert problem.startswith("m: ")


LAYER = """\
import os

LIMIT = 3


def asked(x):
    if x > LIMIT:
        raise ValueError(
            "no"
        )
    return x
"""


@pytest.mark.parametrize(
    ("old", "new", "executed"),
    [
        ("LIMIT = 3", "LIMIT = 4", {3}),
        ("x > LIMIT", "x < LIMIT", {6, 7, 11}),
        ('"no"', '"yes"', {8}),  # the statement's other lines count
        ("    return x", "    return -x", {11}),
        ("    return x", "    os.sync()\n    return x", {11}),
        ("        raise", "        os.sync()\n        raise", {8}),
    ],
)
def test_a_mutation_is_refused_where_training_does_not_execute_its_place(
    tmp_path: Path, old: str, new: str, executed: set[int]
) -> None:
    (tmp_path / "a.py").write_text(LAYER)

    def wrong(path: str, lines: set[int]) -> list[str]:
        mutation = Mutation("m", "", (Edit("a.py", old, new),), (THIS,), path)
        return check_paths([mutation], tmp_path, {"a.py": lines})

    assert wrong("training", executed) == wrong("worker", set()) == []
    assert wrong("worker", executed) == ["m: training executes it, and it says worker"]
    assert wrong("training", {1, 2, 13}) == ["m: training does not execute its place in a.py"]


def test_what_is_planted_must_be_able_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A test that fails because of a misspelt name saw no mistake."""
    file = tmp_path / "planted.py"
    file.write_text(
        "from mutations.mutation import Edit\n"
        "def name(): return whole\n"
        "def frozen(): Edit('a', 'b', 'c').old = 1\n"
        "def arguments(): Edit()\n"
        "def wrapped():\n"
        "    try: name()\n"
        "    except NameError as error: raise ValueError('of ours') from error\n"
        "def mistake(): assert 1 == 2\n"
        "def elsewhere(): return nothing\n"
    )
    spec = importlib.util.spec_from_file_location("planted", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv(PLANTED, json.dumps({str(file.resolve()): list(range(1, 9))}))
    said = {}
    for name in ("name", "frozen", "arguments", "wrapped", "mistake", "elsewhere"):
        pytest_exception_interact(pytest.CallInfo.from_call(getattr(module, name), "call"))
        said[name] = f"{CANNOT_RUN}: " in capfd.readouterr().out
    assert said == {
        "name": True,
        "frozen": True,
        "arguments": True,
        "wrapped": True,
        "mistake": False,
        "elsewhere": False,
    }
    assert not Outcome(1, ("tests/a.py::test_a",), "", "NameError").caught


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_mutation_is_on_the_path_that_it_names() -> None:
    files = sorted({file for mutation in MUTATIONS for file in mutation.files})
    assert check_paths(MUTATIONS, ROOT, executed_by_training(files)) == []


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
