"""Documents and planted mistakes name files and modules that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("deploy/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
    *sorted(x for x in ROOT.glob("tests/mutations/*.py") if x.name != "test_mutations.py"),
    *sorted(x for x in ROOT.glob("benchmarks/**/*.py")),
]
PACKAGES = ("blindtune/common", "checkpoint", "client", "proto", "protocol", "server", "tests", "examples")
# Tests of such checks, which name what is not there.
INVENTED = (Path(__file__), ROOT / "tests" / "mutations" / "test_mutations.py")
SOURCES = [
    ROOT / "blindtune" / "errors.py",
    *(x for folder in PACKAGES for x in (ROOT / folder).rglob("*.py") if x not in (*PAGES, *INVENTED)),
]
NAMES = {x.name for folder in (*PACKAGES, "benchmarks") for x in (ROOT / folder).rglob("*.py")} | {
    "errors.py"
}
FILE = re.compile(r"(?<![\w./-])(?:[\w-]+/)+[\w-]+\.(?:py|md|proto)\b")
BARE_FILE = re.compile(r"`([\w-]+\.py)`")
LINK = re.compile(r"\]\(([\w./-]+)(?:#[\w-]+)?\)")
FOLDER = re.compile(r"`((?:[\w-]+/)+)`")
MODULE = re.compile(r"\b(?:blindtune|benchmarks)(?:\.\w+)+")
# blindtune.yaml is a file, and blindtune.v1 the package of the messages.
NO_MODULES = {"conf", "json", "prom", "schema", "sysusers", "v1", "yaml"}


def module_exists(name: str) -> bool:
    """Whether there is such a module, or such a name in one."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    inside = path.parent / "__init__.py" if path.parent.is_dir() else path.parent.with_suffix(".py")
    return inside.is_file() and bool(re.search(rf"\b{path.name}\b", inside.read_text(encoding="utf-8")))


def unknown_names(text: str, folder: Path) -> list[str]:
    files = [x for x in FILE.findall(text) if not (ROOT / x).exists() and not (folder / x).exists()]
    files += [x for x in BARE_FILE.findall(text) if x not in NAMES]
    modules = [x for x in MODULE.findall(text) if not NO_MODULES & set(x.split("."))]
    return [*files, *(x for x in modules if not module_exists(x))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    assert unknown_names(page.read_text(encoding="utf-8"), page.parent) == []


def test_links_lead_to_files_and_folders() -> None:
    assert not {
        (page.name, x)
        for page in PAGES
        for x in LINK.findall(page.read_text(encoding="utf-8"))
        if page.suffix == ".md" and not (page.parent / x).exists()
    }


def test_the_page_on_the_structure_names_folders_that_exist() -> None:
    named = FOLDER.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    assert not [
        x
        for x in named
        if not any((base / x).is_dir() for base in (ROOT, ROOT / "blindtune", *(ROOT / y for y in PACKAGES)))
    ]


def test_comments_and_docstrings_name_what_exists() -> None:
    """What is imported is found by others: these are names of modules in backquotes, and files of ours."""
    wrong = {}
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        quoted = "\n".join(re.findall(r"`(blindtune\.[\w.]+)`", text))
        files = [x for x in FILE.findall(text) if (ROOT / x.partition("/")[0]).is_dir()]
        wrong[source] = unknown_names("\n".join([quoted, *files]), source.parent)
    assert len(SOURCES) > 500
    assert not {source: names for source, names in wrong.items() if names}


def test_names_of_what_is_gone_are_found() -> None:
    text = (
        "client/gone.py client/errors.py blindtune.gone.room blindtune.client.runs.gone blindtune.errors.Gone"
    )
    assert unknown_names(text, ROOT) == text.split()
    assert unknown_names("`gone.py` and `run.py`", ROOT) == ["gone.py"]
    assert unknown_names("client/runs/run.py blindtune.errors.KitError blindtune.client.runs", ROOT) == []


def test_benchmarks_are_run_as_modules_since_they_would_not_find_each_other_otherwise() -> None:
    assert not {
        page.name: x for page in PAGES for x in re.findall(r"python benchmarks/\S+", page.read_text())
    }
