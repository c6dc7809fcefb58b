"""The lab's results as a table, as JSON, and as a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blindtune.client.audit.lab import COLLUDING, PRIVATE, Cell, LabResult
from blindtune.client.audit.statistics import Judged
from blindtune.errors import ConfigurationError

__all__ = ["as_json", "as_markdown", "as_rows", "plot", "require_matplotlib"]


def as_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Plain values of scores."""
    return [
        {
            "attack": x.score.attack,
            "counted": x.score.counted,
            "successes": x.score.successes,
            "trials": x.score.trials,
            "rate": x.score.rate,
            "low": x.low,
            "high": x.high,
            "chance": x.score.chance,
            "p_value": x.score.p_value,
            "above_chance": x.above_chance,
        }
        for x in judged
    ]


def as_json(result: LabResult) -> str:
    """All figures."""
    cells = [
        {"mask": cell.mask} | row
        for cell, row in zip(result.cells, as_rows([x.judged for x in result.cells]), strict=True)
    ]
    return json.dumps({"seconds": round(result.seconds, 1), "cells": cells}, indent=1) + "\n"


def as_markdown(result: LabResult) -> str:
    """A table of attacks and masks: successes in per cent, bold where they are above chance."""
    attacks, masks = _axes(result.cells)
    chances = {x.judged.score.attack: x.judged.score for x in result.cells}
    lines = [
        f"| attack | chance | {' | '.join(masks)} |",
        f"| --- | ---: |{' ---: |' * len(masks)}",
    ]
    for attack in attacks:
        cells = {x.mask: x.judged for x in result.cells if x.judged.score.attack == attack}
        shown = [_shown(cells[mask]) if mask in cells else "" for mask in masks]
        lines.append(f"| {attack} | {_percent(chances[attack].chance)} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _shown(x: Judged) -> str:
    text = _percent(x.score.rate)
    return f"**{text}**" if x.above_chance else text


def _percent(x: float) -> str:
    return f"{100 * x:.1f}" if x >= 0.0005 or x == 0 else "< 0.1"


def _axes(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    attacks = list(dict.fromkeys(x.judged.score.attack for x in cells))
    return attacks, list(dict.fromkeys(x.mask for x in cells))


def require_matplotlib() -> None:
    """Asks for the plotting library before minutes are spent.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigurationError("the lab's plot needs matplotlib: pip install 'blindtune[audit]'") from None


def plot(result: LabResult, path: Path) -> None:
    """Writes a PNG: a panel for each attack, with each mask's success, its interval, and chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attacks, masks = _axes(result.cells)
    columns = 4
    lines = -(-len(attacks) // columns)
    figure = Figure(figsize=(15, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    for panel in axes.ravel()[len(attacks) :]:
        panel.set_visible(False)
    for attack, panel in zip(attacks, axes.ravel(), strict=False):
        cells = {x.mask: x.judged for x in result.cells if x.judged.score.attack == attack}
        chance = next(iter(cells.values())).score.chance
        panel.axvline(100 * chance, color="0.35", linestyle="--", linewidth=1)
        for place, mask in enumerate(masks):
            if mask not in cells:
                continue
            x = cells[mask]
            panel.errorbar(
                100 * x.score.rate,
                place,
                xerr=[[100 * (x.score.rate - x.low)], [100 * (x.high - x.score.rate)]],
                fmt="o",
                markersize=5,
                capsize=3,
                color=_colour(mask),
            )
        panel.set_title(f"{attack} (chance {_percent(chance)} %)", fontsize=10)
        panel.set_xlim(-4, 104)
        panel.grid(axis="x", color="0.9")
        panel.tick_params(labelbottom=True)
    axes[0, 0].set_yticks(range(len(masks)), masks)
    axes[0, 0].set_ylim(len(masks) - 0.5, -0.5)
    figure.supxlabel("successes in %, with the interval that holds for all at once; dashed: chance")
    FigureCanvasAgg(figure).print_png(path)


def _colour(mask: str) -> str:
    if mask in PRIVATE:
        return "tab:blue"
    return "tab:orange" if mask == COLLUDING else "tab:red"
