"""The worker's variables of the environment as tables, made from the options of its command.

    python -m blindtune.server.reference docs

renews them in ``environment.md``, between the two lines that mark them, and leaves the rest of it alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from blindtune.errors import ConfigurationError
from blindtune.server.cli import app

__all__ = ["BEGIN", "END", "PAGE", "renewed", "variables", "variables_section", "write_reference"]

PAGE = "environment.md"
BEGIN = "<!-- made by make docs: variables of blindtune-worker -->"
END = "<!-- end of what make docs makes -->"


def variables() -> dict[str, list[Any]]:
    """For each command, its options and arguments that have a twin in the environment."""
    group: Any = typer.main.get_command(app)  # a click group, of a copy of click that typer carries
    return {
        name: [parameter for parameter in command.params if parameter.envvar]
        for name, command in group.commands.items()
    }


def variables_section() -> str:
    """One table for each command, as Markdown."""
    return "\n".join(
        f"### `blindtune-worker {command}`\n\n{_table(parameters)}"
        for command, parameters in variables().items()
    )


def renewed(page: str) -> str:
    """A page with the tables of the code in place of those between the marks.

    Raises:
        ConfigurationError: the page does not have both marks, once each and in order.
    """
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end) or page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ConfigurationError(f"{PAGE}: expected the lines {BEGIN} and {END}, once each: restore them")
    return f"{before}{begin}\n{variables_section()}\n{end}{after}"


def write_reference(folder: Path) -> None:
    """Renews the page in a folder."""
    path = folder / PAGE
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


def _table(parameters: list[Any]) -> str:
    head = ("variable", "stands for", "default", "meaning")
    rows = [head, ("---",) * len(head), *(_row(parameter) for parameter in parameters)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(parameter: Any) -> Iterator[str]:
    yield f"`{parameter.envvar}`"
    yield f"`{parameter.opts[0]}`" if parameter.param_type_name == "option" else f"`{parameter.name.upper()}`"
    yield _default(parameter)
    yield parameter.help.replace("|", "\\|")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "must be given"
    if parameter.is_flag:
        return "off; 1 switches it on"
    return "" if parameter.default is None else f"`{parameter.default}`"


def main() -> None:
    """Renews the page in the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m blindtune.server.reference FOLDER")
    try:
        write_reference(Path(sys.argv[1]))
    except (ConfigurationError, OSError) as error:
        sys.exit(f"blindtune.server.reference: {error}")


if __name__ == "__main__":
    main()
