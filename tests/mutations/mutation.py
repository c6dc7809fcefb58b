"""A mutation: one mistake, planted by exact replacements of text, and the tests that ought to notice."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Edit", "Mutation", "check"]


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


@dataclass(frozen=True)
class Mutation:
    """A classical mistake, and who catches it.

    Attributes:
        id: short, unique.
        mistake: what was done, in words.
        edits: make the mistake.
        tests: ``FILE::FUNCTION``, chosen narrowly; one failure of any of them catches it.
    """

    id: str
    mistake: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]

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
        return [f"{self.id}: {problem}" for problem in found]

    def apply(self, root: Path) -> None:
        """Plants it in a copy of the repository, whose `problems` are none."""
        for edit in self.edits:
            path = root / edit.file
            path.write_text(path.read_text().replace(edit.old, edit.new))


def check(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """What is wrong with a table of mutations, for a repository as it is now."""
    names = [mutation.id for mutation in mutations]
    twice = sorted({f"{name}: two mutations have this name" for name in names if names.count(name) > 1})
    return twice + [problem for mutation in mutations for problem in mutation.problems(root)]


def _exists(root: Path, test: str) -> bool:
    file, _, function = test.partition("::")
    path = root / file
    return path.is_file() and function in {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }
