"""docs/mutations.md."""

from collections.abc import Iterable

from mutations.mutation import PATHS, Mutation
from mutations.workplace import ROOT

__all__ = ["DOCUMENT", "document"]

DOCUMENT = ROOT / "docs" / "mutations.md"

_HEAD = """\
# Mistakes that the tests catch

Protocols like this one are seldom broken by mathematics, and often by one line. Each line of this table is a
mistake that somebody could make. It is planted in a copy of the code, and the tests named for it are run: at
least one of them must fail, or there is a test too few.

    make mutations                         # all; ends with an error if one goes unnoticed
    make mutations ARGS="--only lattice"   # those whose name holds a text
    make mutations ARGS="--write"          # all, and writes this page

Before that, all these tests pass on a copy without any mistake. What counts is a test that fails; code that
can't be imported, or can't run where it was planted, is caught by nothing. A mistake where nobody comes past
shows nothing either: each says the path that it stands for. What is said to be on the path of training is
refused unless a real training executes it, which is seen by running one through workers under each masking
and noting the lines; and what is said to be elsewhere is refused if a training does execute it. In compiled
kernels, whole functions are noted.

The mistakes are data: `tests/mutations/mutations.py`, `kept.py`, and `slips_*.py`, whose slips were planted
by somebody who had not read the tests. A test that is everyday makes sure that each of them still finds its
place in the code; `make test-slow` that it is on its path, and tries a sixth of them.

A mistake that is not in this table may go unnoticed. Among those that no test of the code's behaviour can
see are a time that depends on a secret within one machine instruction, and secrets that stay in memory after
their use.

| path | is |
|---|---|
@PATHS@
| mutation | mistake | in | path | caught by |
|---|---|---|---|---|
"""


def document(caught: Iterable[tuple[Mutation, str]]) -> str:
    """The page, from mutations and the test that caught each."""
    lines = []
    for mutation, test in caught:
        file, _, function = test.partition("::")
        places = ", ".join(f"`{name}`" for name in mutation.files)
        said = f"{mutation.id} | {mutation.mistake} | {places} | {mutation.path}"
        lines.append(f"| {said} | `{function}` in `{file}` |\n")
    paths = "".join(f"| {path} | {text} |\n" for path, text in PATHS.items())
    return _HEAD.replace("@PATHS@\n", f"{paths}\n") + "".join(lines)
