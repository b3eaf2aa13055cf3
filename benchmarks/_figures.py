"""What every benchmark ends with: a table for people, then one line of JSON for machines."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True)
class Figure:
    """One measured number. A goal reads like `<= 0.05`; without one the figure is only shown."""

    name: str
    value: float
    unit: str
    goal: str | None = None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return bool(_COMPARE[sign](self.value, float(bound)))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*map(str, row))
    Console(width=120).print(shown)


def report(benchmark: str, figures: Sequence[Figure]) -> None:
    """Print the figures as a table, and as the last line the JSON object that DESIGN describes."""
    met = {True: "yes", False: "NO", None: ""}
    table(
        ["figure", "value", "unit", "goal", "met"],
        [[f.name, f"{f.value:.4g}", f.unit, f.goal or "", met[f.met]] for f in figures],
    )
    said = [{"name": f.name, "value": f.value, "unit": f.unit, "goal": f.goal, "met": f.met} for f in figures]
    print(json.dumps({"benchmark": benchmark, "figures": said}))
