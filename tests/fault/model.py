"""Every history of small sites, with the ledger and the governor that ship, and each deliberate bug's shortest trace.

    python -m tests.fault.model [--scene NAME] [--bug NAME] [--faults N] [--states N] [--processes 2]

Breadth first, so that the trace of a violation is a shortest one. See `scenes.py` for what is explored, and
`explore.py` for how.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from tests.fault.bugs import BUGS
from tests.fault.explore import Result, explore
from tests.fault.parts import Kit
from tests.fault.scenes import SCENES

WHERE = {
    "skip read-back": ("nodes", 2),
    "drop fencing": ("nodes", 1),
    "ignore hold": ("nodes", 1),
    "reuse an epoch": ("there and back", 1),
    "credit an expired hold": ("nodes", 1),
    "raise before lower": ("network", 0),
    "trust a cap across a reboot": ("nodes", 2),
    "skip the claim": ("a late write", 1),
}
"""The scene that brings each bug to light, and how many faults that takes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", default="", choices=["", *SCENES])
    parser.add_argument("--bug", default="", choices=["", *WHERE])
    parser.add_argument("--faults", type=int, default=None)
    parser.add_argument("--states", type=int, default=10**9)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    scenes = (
        []
        if options.bug
        else [options.scene]
        if options.scene
        else [name for name, scene in SCENES.items() if scene.whole]
    )
    bugs = [] if options.scene else [options.bug] if options.bug else list(WHERE)
    jobs = [(name, "", options.faults, options.states) for name in scenes]
    jobs += [(WHERE[name][0], name, options.faults, options.states) for name in bugs]
    began = time.monotonic()
    bad = states = 0
    with ProcessPoolExecutor(
        options.processes, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for done in as_completed([pool.submit(_job, job) for job in jobs]):
            good, found, lines = done.result()
            bad += not good
            states += found
            print(lines, flush=True)
    print(
        f"{states:,} states in {time.monotonic() - began:.0f} s; {bad} scenes or bugs not as they should be"
    )
    return 1 if bad else 0


def _job(job: tuple[str, str, int | None, int]) -> tuple[bool, int, str]:
    """Is it as it should be, how many states, and what to print."""
    scene, bug, faults, most_states = job
    if faults is None:
        faults = WHERE[bug][1] if bug else SCENES[scene].most_faults
    began = time.monotonic()
    result = explore(SCENES[scene], BUGS[bug] if bug else Kit(), faults=faults, most_states=most_states)
    seconds = time.monotonic() - began
    trace = "".join(f"\n    {line}" for line in result.trace)
    if bug:
        return bool(result.violation), result.states, _told(bug, scene, result, seconds) + trace
    end = "complete" if result.complete else "NOT COMPLETE"
    text = (
        f"{scene}, up to {faults} faults: {end}, {result.states:,} states, {result.steps:,} steps,"
        f" depth {result.depth}, {int(bool(result.violation))} violations ({seconds:.0f} s) {result.violation}"
    )
    return result.complete and not result.violation, result.states, text + trace


def _told(bug: str, scene: str, result: Result, seconds: float) -> str:
    if not result.violation:
        return f"{bug}: NOT FOUND in {scene} ({result.states:,} states, {seconds:.0f} s)"
    return f"{bug}: found in {len(result.trace)} steps ({result.states:,} states, {seconds:.0f} s): {result.violation}"


if __name__ == "__main__":
    sys.exit(main())
