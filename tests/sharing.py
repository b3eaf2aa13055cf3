"""Who runs what when several workers share the suite (`pytest -n 3`, as `make test` does).

A module is never torn apart: what its fixtures start, they start once. All of tests/node is one piece, since it is
about one machine. The longest pieces begin first, so that none of them is still running alone at the
end. Each says when it is done and how long it took: dots of three workers at once tell nobody how far they are.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/node/",)
LONGEST_FIRST = (
    "tests/unit/planning/power/test_parking.py",
    "tests/cluster/scenarios/test_crashes.py",
    "tests/cluster/scenarios/test_other_hands.py",
    "tests/cluster/scenarios/test_workloads.py",
    "tests/cluster/scenarios/test_power.py",
    "tests/cluster/scenarios/test_life.py",
    "tests/node/",
    "tests/unit/planning/placement/test_optimum.py",
    "tests/agent/test_agent_",
    "tests/scale/",
    "tests/cluster/test_controlplane.py",
    "tests/unit/planning/power/test_zones.py",
    "tests/unit/planning/power/test_budgets.py",
    "tests/cluster/kube/",
    "tests/fault/",
    "tests/cluster/",
    "tests/unit/planning/power/test_market.py",
    "tests/chart/",
)
"""By what a run with `--durations=0` says. A wrong order costs only time."""


def piece(nodeid: str) -> str:
    """What this test must stay together with: its module, or the folder that is one."""
    module = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if module.startswith(folder)), module)


def longest_first(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(nodeid: str) -> int:
    return next(
        (rank for rank, start in enumerate(LONGEST_FIRST) if nodeid.startswith(start)), len(LONGEST_FIRST)
    )


class Pieces(LoadScopeScheduling):
    """Hands out whole pieces, in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False
        self._began = time.monotonic()
        self._free_since: dict[Any, float] = {}
        self._done = 0

    def _split_scope(self, nodeid: str) -> str:
        return piece(nodeid)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        super().mark_test_complete(node, item_index, duration)
        self._done += 1
        name = piece(self.registered_collections[node][item_index])
        tests = self.assigned_work[node][name]
        if says_pieces(self.config) and all(tests.values()):
            now = time.monotonic()
            seconds = now - self._free_since.get(node, self._began)
            self._free_since[node] = now
            share = 100 * self._done // len(self.collection or tests)
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            if terminal._tw.width_of_current_line:  # letters of tests that did not pass
                terminal.line("")
            terminal.write_line(f"[{share:3}%] {seconds:4.0f} s  {len(tests):3} of {name}")
            terminal.flush()


def says_pieces(config: pytest.Config) -> bool:
    """Whether this is the process that tells how several workers get on, and is not asked to be quiet."""
    return config.pluginmanager.has_plugin("dsession") and config.option.verbose == 0
