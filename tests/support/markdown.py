"""Tables of a Markdown document, so that tests can hold the documentation to what the code says."""

from collections.abc import Iterator

__all__ = ["section", "tables"]


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Each table as rows by column name, without the emphasis."""
    lines = text.splitlines()
    for i in range(1, len(lines)):
        if lines[i].startswith("|") and set(lines[i]) <= set("|-: "):
            names, rows = _cells(lines[i - 1]), []
            for line in lines[i + 1 :]:
                if not line.startswith("|"):
                    break
                rows.append(dict(zip(names, _cells(line), strict=True)))
            yield rows


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level, up to the next one."""
    _, found, rest = text.partition(f"\n## {title}\n")
    if not found:
        raise ValueError(f"no section {title!r}")
    return rest.partition("\n## ")[0]
