"""What every benchmark ends with: a table for people, then one line of JSON for machines."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


def quick() -> bool:
    """QUICK=1: the same shape within 45 s on two cores."""
    return os.environ.get("QUICK", "") not in {"", "0"}


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


@dataclass
class Report:
    """Collects figures one by one; `show` reports them."""

    benchmark: str
    seed: int
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, goal: str = "") -> None:
        """`goal` such as "<= 0.05"; empty where a figure is only for comparison."""
        self.figures.append(Figure(name, float(f"{value:.6g}"), unit, goal or None))

    def show(self) -> int:
        """The exit status says whether every goal was met."""
        print(f"{self.benchmark}  (seed {self.seed}{', quick' if quick() else ''})")
        report(self.benchmark, self.figures)
        return int(any(figure.met is False for figure in self.figures))
