"""What every benchmark says, in one shape: a table for people and, as the last line, one JSON object."""

import json
import os
from dataclasses import dataclass, field

_COMPARE = {"<=": lambda value, goal: value <= goal, ">=": lambda value, goal: value >= goal}


def quick() -> bool:
    """QUICK=1: the same shape within 45 s on two cores."""
    return os.environ.get("QUICK", "") not in {"", "0"}


@dataclass
class Report:
    """Collects figures; `show` prints them."""

    benchmark: str
    seed: int
    figures: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, goal: str = "") -> None:
        """`goal` such as "<= 0.05"; empty where a figure is only for comparison."""
        figure: dict[str, object] = {"name": name, "value": float(f"{value:.6g}"), "unit": unit}
        if goal:
            sign, number = goal.split()
            figure |= {"goal": goal, "met": bool(_COMPARE[sign](value, float(number)))}
        self.figures.append(figure)

    @property
    def met(self) -> bool:
        return all(f.get("met", True) for f in self.figures)

    def show(self) -> int:
        """Prints table and JSON; the exit status says whether every goal was met."""
        print(f"{self.benchmark}  (seed {self.seed}{', quick' if quick() else ''})")
        width = max((len(str(f["name"])) for f in self.figures), default=0)
        for f in self.figures:
            verdict = "" if "met" not in f else "met" if f["met"] else "MISSED"
            print(
                f"  {f['name']:<{width}}  {f['value']:>14,} {f['unit']:<10} {f.get('goal', ''):<12} {verdict}"
            )
        print(json.dumps({"benchmark": self.benchmark, "seed": self.seed, "figures": self.figures}))
        return 0 if self.met else 1
