"""docs/mutations.md."""

from collections.abc import Iterable

from mutations.mutation import Mutation
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
can't be imported is caught by nothing. The mistakes are data: `tests/mutations/mutations.py`. A test that is
everyday makes sure that each of them still finds its place in the code, and `make test-slow` tries a sixth of
them.

A mistake that is not in this table may go unnoticed. Among those that no test of the code's behaviour can
see are a time that depends on a secret within one machine instruction, and secrets that stay in memory after
their use.

| mutation | mistake | in | caught by |
|---|---|---|---|
"""


def document(caught: Iterable[tuple[Mutation, str]]) -> str:
    """The page, from mutations and the test that caught each."""
    lines = []
    for mutation, test in caught:
        file, _, function = test.partition("::")
        places = ", ".join(f"`{name}`" for name in mutation.files)
        lines.append(f"| {mutation.id} | {mutation.mistake} | {places} | `{function}` in `{file}` |\n")
    return _HEAD + "".join(lines)
