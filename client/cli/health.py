"""``blindtune check`` and ``blindtune doctor``: what would go wrong, before it does."""

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from blindtune.client.cli.console import emit, messages, results
from blindtune.client.cli.recipes import Config, Settings
from blindtune.client.preflight.finding import Finding
from blindtune.client.process.exit_codes import ExitCode

__all__ = ["check", "doctor"]

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
Json = Annotated[bool, typer.Option("--json", help="One line of JSON for each check, on stdout.")]


def check(config: Config, settings: Settings = None, json: Json = False) -> None:
    """Look for whatever would stop a run: data, model, disk, addresses, certificates, versions, bandwidth."""
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.preflight.recipe import check_recipe
    from blindtune.client.trust.choice import own_recipe

    recipe = own_recipe(config, settings or [])
    quiet_libraries()
    _show(check_recipe(recipe), json)


def doctor(json: Json = False) -> None:
    """Look at this machine: libraries, exactness of its products, memory, disk and settings."""
    from blindtune.client.cli.quiet import quiet_libraries
    from blindtune.client.preflight.machine import diagnose

    quiet_libraries()
    _show(diagnose(), json)


def _show(findings: Iterable[Finding], json: bool) -> None:
    """Shows findings as they come, and ends with their exit code."""
    seen = []
    for finding in findings:
        seen.append(finding)
        if json:
            emit("finding", **vars(finding))
        else:
            _print(finding)
    count = {status: sum(x.status == status for x in seen) for status in _STYLES}
    if not json:
        messages.print(
            f"ok {count['ok']}, warnings {count['warning']}, problems {count['problem']}", highlight=False
        )
    if count["problem"]:
        raise typer.Exit(ExitCode.FINDINGS)


def _print(finding: Finding) -> None:
    """Wrapped for a terminal; in a file or a pipe a finding is a line, and so is its remedy."""
    if results.is_terminal:
        results.print(_table(finding))
        return
    lines = [f"{finding.status:8} {finding.check}: {finding.detail}"]
    if finding.fix:
        lines.append(f"         -> {finding.fix}")
    for line in lines:
        results.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(finding: Finding) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(width=8, no_wrap=True)
    table.add_column(ratio=1)
    table.add_row(
        Text(finding.status, style=_STYLES[finding.status]), Text(f"{finding.check}: {finding.detail}")
    )
    if finding.fix:
        table.add_row("", Text(f"-> {finding.fix}", style="italic"))
    return table
