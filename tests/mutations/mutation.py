"""A mutation: one mistake, planted by exact replacements of text, and the tests that ought to notice."""

import ast
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["PATHS", "Edit", "Mutation", "check", "check_paths", "mutation"]

PATHS = {
    "training": "what a training of the client executes",
    "certified": "what a training executes where results wrap around, besides",
    "integers": "operands that come as integers, as an audit's do and those that leave no room for noise",
    "refusals": "what refuses, or is printed: pickles, words that are no residues, messages",
    "worker": "what a worker executes",
    "failures": "workers that hang or change, and clients that sleep or are interrupted",
    "measuring": "a training that measures as it goes",
    "commands": "other commands, and configurations that a training refuses",
    "resume": "a run that goes on, or ends early",
    "record": "verifying a record",
}
"""Where a line stands that a mutation changes: training where it executes the line, and only then."""


@dataclass(frozen=True)
class Edit:
    """A replacement in one file.

    Attributes:
        file: path in the repository.
        old: text that stands in the file exactly once.
        new: what takes its place.
    """

    file: str
    old: str
    new: str

    def problem(self, root: Path) -> str | None:
        """Why the edit can't be made in a repository, or None."""
        try:
            found = (root / self.file).read_text().count(self.old)
        except OSError as error:
            return f"{self.file} cannot be read: {error.strerror}"
        return None if found == 1 else f"{found} places in {self.file} hold {self.old!r}, not one"

    def place(self, root: Path) -> set[int]:
        """Numbers of the lines of a repository's file that it changes, or beside which it adds some."""
        return _changed(*self._texts(root))

    def planted(self, root: Path) -> set[int]:
        """Numbers of the lines of the file with the mistake that are not in the file without."""
        before, after = self._texts(root)
        return _changed(after, before)

    def _texts(self, root: Path) -> tuple[str, str]:
        text = (root / self.file).read_text()
        return text, text.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutation:
    """A classical mistake, and who catches it.

    Attributes:
        id: short, unique.
        mistake: what was done, in words.
        edits: make the mistake.
        tests: ``FILE::FUNCTION``, chosen narrowly; one failure of any of them catches it.
        path: where it is executed, one of `PATHS`.
    """

    id: str
    mistake: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    path: str = "training"

    @property
    def files(self) -> list[str]:
        """The files that it changes."""
        return list(dict.fromkeys(edit.file for edit in self.edits))

    def problems(self, root: Path) -> list[str]:
        """Why it can't be tried in a repository: edits without their place, tests that are not there."""
        found = [problem for edit in self.edits if (problem := edit.problem(root))]
        found += [f"there is no test {test}" for test in self.tests if not _exists(root, test)]
        if not self.edits or not self.tests:
            found.append("it changes nothing, or names no test")
        if self.path not in PATHS:
            found.append(f"there is no path {self.path}")
        return [f"{self.id}: {problem}" for problem in found]

    def apply(self, root: Path) -> None:
        """Plants it in a copy of the repository, whose `problems` are none."""
        for edit in self.edits:
            path = root / edit.file
            path.write_text(path.read_text().replace(edit.old, edit.new))


def mutation(
    id: str, mistake: str, file: str, old: str, new: str, *tests: str, path: str = "training"
) -> Mutation:
    """A mutation of one edit."""
    return Mutation(id, mistake, (Edit(file, old, new),), tests, path)


def check(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """What is wrong with a table of mutations, for a repository as it is now."""
    names = [mutation.id for mutation in mutations]
    twice = sorted({f"{name}: two mutations have this name" for name in names if names.count(name) > 1})
    return twice + [problem for mutation in mutations for problem in mutation.problems(root)]


def check_paths(mutations: Sequence[Mutation], root: Path, executed: Mapping[str, set[int]]) -> list[str]:
    """Which mutations are not on the path that they name.

    Args:
        mutations: without any problem.
        root: of the repository.
        executed: lines that a training executes, by file.
    """
    wrong = []
    for mutation in mutations:
        missed = [
            edit.file
            for edit in mutation.edits
            if not _statements((root / edit.file).read_text(), edit.place(root)) & executed[edit.file]
        ]
        if mutation.path == "training" and missed:
            wrong.append(f"{mutation.id}: training does not execute its place in {', '.join(missed)}")
        if mutation.path != "training" and not missed:
            wrong.append(f"{mutation.id}: training executes it, and it says {mutation.path}")
    return wrong


def _changed(text: str, other: str) -> set[int]:
    """Numbers of a text's lines that differ in another text; those around what is only in the other."""
    lines = text.splitlines()
    matcher = difflib.SequenceMatcher(None, lines, other.splitlines(), autojunk=False)
    found: set[int] = set()
    for tag, start, stop, _, _ in matcher.get_opcodes():
        if tag != "equal":
            found.update(range(start + 1, stop + 1) if stop > start else (start, start + 1))
    return found


def _statements(text: str, lines: set[int]) -> set[int]:
    """All lines of the innermost statements that hold some lines, without the bodies of compound ones."""
    spans = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = node.end_lineno or node.lineno
            spans.append((node.lineno, max(node.lineno, body[0].lineno - 1) if body else end))
    found: set[int] = set()
    for line in lines:
        if holding := [span for span in spans if span[0] <= line <= span[1]]:
            first, last = max(holding)
            found.update(range(first, last + 1))
    return found


def _exists(root: Path, test: str) -> bool:
    file, _, function = test.partition("::")
    path = root / file
    return path.is_file() and function in _functions(path.read_text())


@cache
def _functions(text: str) -> frozenset[str]:
    return frozenset(x.name for x in ast.parse(text).body if isinstance(x, ast.FunctionDef))
