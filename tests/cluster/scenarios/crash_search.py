"""Every write of every chapter is one that an operator dies of, before it is done and after; then long random walks.

Each round of chapters is first gone through undisturbed, which says how many writes a chapter has and that it ends as a
fresh deploy does. Then it is gone through once for each of them: the operator dies of that write, and the chapter must end
just so all the same. The budget is checked from the simulated GPUs' true limits all the while.

Most of a turn is waiting for what the product waits for on purpose, so several sites share a machine, each with a
control plane and processes of its own. What has been gone through is kept in a file, by the commit it was of: the
same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.scenarios.crashes import Mortal, Point, decides
from tests.cluster.scenarios.groups import leader_worker_sets
from tests.cluster.scenarios.outcome import outcome
from tests.cluster.scenarios.scene import Scene, plans
from tests.cluster.scenarios.story import ROUNDS, Change, Chapter, Round, emptied, fresh, told
from tests.cluster.scenarios.walk import Walker, walk_of

from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.site import Site
from tokenfactory.twin.toolchain import cache_folder

VALUES = ("leaderWorkerSets.enabled=true",)
STRIPES = {"factory": 2, "group": 2, "rollout": 2, "failover": 2, "node": 3}
"""Rounds with so many points that several sites share them."""
WALK = "walk"
UNDISTURBED = "undisturbed"
MORE = 1
"""Points beyond what the undisturbed chapter wrote: how often a status is written depends on the moment."""
LEAST_DEATHS = frozenset(
    {
        "POST capsheets", "PUT capsheets", "DELETE capsheets", "PUT capsheets (renewal)",
        "POST gpunodes", "PUT gpunodes", "DELETE gpunodes", "PATCH nodes", "PATCH pods", "DELETE pods",
        "PATCH deployments", "DELETE deployments", "PATCH services", "DELETE services", "PATCH leaderworkersets",
        "DELETE leaderworkersets",
        "PATCH powerdomains/status", "PATCH tokenfactories/status", "PATCH checkpoints",
        "POST events", "POST leases", "PUT leases", "POST deployments (asked)",
    }
)  # fmt: skip
"""What an operator must at least have died of when everything was gone through."""


@dataclass(frozen=True)
class Task:
    """A stripe of a round, or a walk."""

    name: str
    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        return self.name if self.of == 1 else f"{self.name} ({self.number + 1}/{self.of})"


@dataclass
class Score:
    """What came of it."""

    points: Counter[str] = field(default_factory=Counter)
    """`before` and `after`: operators that died there; `not reached`: the chapter had no such write."""
    deaths: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    walks: int = 0
    samples: int = 0
    skipped: int = 0
    finished: int = 0
    """Tasks, as a whole or as far as they could be."""


class Worker:
    """One process, one site at a time; an answer to the parent for each thing that it has gone through."""

    def __init__(self, options: argparse.Namespace, folder: Path, answers: Any) -> None:
        self._options = options
        self._folder = folder
        self._answers = answers
        self._sites = itertools.count(1)
        self._known: dict[tuple[str, ...], Any] = {}
        self._done: frozenset[str] = frozenset(options.done)
        self._sampled = 0

    async def run(self, tasks: Any) -> None:
        task: Task | None = tasks.get()
        while task is not None:
            site_folder = self._folder / f"site-{next(self._sites)}"
            self._known.clear()
            self._sampled = 0
            try:
                async with _site(site_folder) as mortal:
                    while task is not None:
                        await self._take(mortal, task)
                        task = self._next(tasks)
            except Exception as error:
                goes_on = self._goes_on(task, error, site_folder)
                if task is not None and not goes_on:
                    task = self._next(tasks)
            else:
                shutil.rmtree(site_folder, ignore_errors=True)

    def _next(self, tasks: Any) -> Task | None:
        self._tell("finished")
        task: Task | None = tasks.get()
        return task

    def _goes_on(self, task: Task | None, error: Exception, folder: Path) -> bool:
        """With the rest of the same task, on a new site, where a point of it failed; anything else ends it."""
        if isinstance(error, PointError):
            self._tell("failure", key=error.key, text=f"{error} (logs: {folder})")
            self._done |= {error.key}
            return task is not None and task.name != WALK and not error.key.endswith(UNDISTURBED)
        text = "".join(traceback.format_exception(error, limit=-4))
        self._tell("failure", key=str(task), text=f"{task}: {text} (logs: {folder})")
        return False

    def _tell(self, what: str, **more: Any) -> None:
        self._answers.put({"what": what, **more})

    async def _take(self, mortal: Mortal, task: Task) -> None:
        if task.name == WALK:
            await self._walk(mortal, task.number)
        else:
            await self._go_through(mortal, ROUNDS[task.name], task)

    async def _walk(self, mortal: Mortal, number: int) -> None:
        key = f"walk {number}, {self._options.steps} steps"
        if key in self._done:
            self._tell("skipped", count=1)
            return
        deaths = mortal.deaths.total()
        await emptied(mortal)
        try:
            await Walker(mortal).follow(walk_of(number, self._options.steps, groups=True))
        except Exception as error:
            raise PointError(key, error) from error
        self._passed(mortal, key, walk=True, died=mortal.deaths.total() > deaths)

    async def _go_through(self, mortal: Mortal, round_: Round, task: Task) -> None:
        ends = await self._undisturbed(mortal, round_)
        wanted = {
            chapter.name: self._points(chapter, ends[chapter.name], task) for chapter in round_.chapters
        }
        left = sum(map(len, wanted.values()))
        written = ", ".join(f"{name} {end.writes}" for name, end in ends.items())
        self._tell("say", text=f"{task}: {left} points to go; writes: {written}")
        for points in itertools.zip_longest(*wanted.values()):
            if round_.reset:
                await self._reset(mortal, round_)
            for chapter, point in zip(round_.chapters, points, strict=True):
                await self._turn(mortal, chapter, ends, point)

    def _points(self, chapter: Chapter, end: End, task: Task) -> list[Point]:
        """Of this stripe, what is to be gone through and has not been."""
        if chapter.counts is None:
            return []
        every = [
            Point(number, landed) for number in range(1, end.writes + MORE + 1) for landed in (False, True)
        ]
        most = self._options.points
        if most and len(every) > most:
            every = sorted(
                random.Random(f"{self._options.seed} {chapter.name}").sample(every, most),
                key=lambda point: (point.number, point.landed),
            )
        mine = every[task.number :: task.of]
        left = [point for point in mine if _key(chapter, point) not in self._done]
        self._tell("skipped", count=len(mine) - len(left))
        return left

    async def _undisturbed(self, mortal: Mortal, round_: Round) -> dict[str, End]:
        """Once, with operators that live. Each end must be that of a fresh deploy; and how often is it written?"""
        ends = {
            chapter.name: End(await self._fresh(mortal, chapter.fresh))
            for chapter in round_.chapters[:-1]
            if chapter.fresh is not None
        }
        begin = await self._fresh(mortal, round_.begin, stay=True)
        last = round_.chapters[-1]
        if last.fresh is not None:
            assert last.fresh == round_.begin, "a round ends where it begins"
            ends[last.name] = End(begin)
        for chapter in round_.chapters:
            since = len(mortal.proxy.requests)
            await chapter.change(mortal)
            if chapter.name in ends:
                begun = not chapter.changed_first
                await self._rested(mortal, _key(chapter, None), ends[chapter.name].expected, begun=begun)
            else:
                if chapter.over is not None:
                    await chapter.over(mortal)
                await told(mortal)
                ends[chapter.name] = End(await outcome(mortal.scene))
            if chapter.counts is not None:
                ends[chapter.name].writes = mortal.counted(chapter.counts, since)
        return ends

    async def _fresh(self, mortal: Mortal, steps: tuple[Change, ...], *, stay: bool = False) -> Any:
        """What a fresh deploy of that is. It is there in the end if we are to `stay`."""
        key = tuple(step.__name__ for step in steps)
        if key not in self._known:
            self._known[key] = await fresh(mortal, steps)
        elif stay:
            await emptied(mortal)
            for step in steps:
                await step(mortal)
            await self._rested(mortal, f"{', '.join(key)}, {UNDISTURBED}", self._known[key])
        return self._known[key]

    async def _reset(self, mortal: Mortal, round_: Round) -> None:
        for step in round_.reset:
            await step(mortal)
        await mortal.rested(await self._fresh(mortal, round_.begin))

    async def _turn(
        self, mortal: Mortal, chapter: Chapter, ends: dict[str, End], point: Point | None
    ) -> None:
        """One chapter, with or without a death."""
        crash = None
        kills = chapter.counts or decides
        if point is not None and not chapter.changed_first:
            crash = mortal.dies_at(point, kills)
        try:
            await chapter.change(mortal)
            if point is not None and chapter.changed_first:
                crash = mortal.dies_at(point, kills)
            await mortal.rested(ends[chapter.name].expected, crash, begun=not chapter.changed_first)
        except Exception as error:
            raise PointError(_key(chapter, point), error) from error
        if point is not None:
            died = crash is not None and crash.happened.is_set()
            self._passed(mortal, _key(chapter, point), died=died, landed=point.landed)

    async def _rested(self, mortal: Mortal, key: str, expected: Any, *, begun: bool = True) -> None:
        try:
            await mortal.rested(expected, begun=begun)
        except Exception as error:
            raise PointError(key, error) from error

    def _passed(self, mortal: Mortal, key: str, **more: Any) -> None:
        site = mortal.scene.site
        site.check_sampler()
        broken, site.breaches[:] = [f"{key}: {breach}" for breach in site.breaches], []
        deaths, samples = dict(mortal.deaths), site.samples - self._sampled
        mortal.deaths.clear()
        self._sampled = site.samples
        self._tell("passed", key=key, broken=broken, deaths=deaths, samples=samples, **more)


@dataclass
class End:
    expected: Any
    writes: int = 0


class PointError(Exception):
    """A divergence, a breach, or a site that did not come to rest."""

    def __init__(self, key: str, error: Exception) -> None:
        said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        super().__init__(f"{key}: {said}")
        self.key = key


def _key(chapter: Chapter, point: Point | None) -> str:
    return f"{chapter.name}, killed {point}" if point is not None else f"{chapter.name}, {UNDISTURBED}"


@asynccontextmanager
async def _site(folder: Path) -> Any:
    with Cluster.up(folder / "cluster") as cluster:
        async with Site(cluster, folder, plans(), cold_seconds=0.5, values=VALUES) as site:
            with leader_worker_sets(cluster):
                scene = Scene(site)
                await scene.begin()
                async with Mortal(scene) as mortal:
                    yield mortal


def _work(options: argparse.Namespace, folder: Path, tasks: Any, answers: Any) -> None:
    asyncio.run(Worker(options, folder, answers).run(tasks))


# --- the parent


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """The long ones first; walks fill what is left."""
    wanted = set(options.only or (*ROUNDS, WALK))
    found = [
        Task(name, number, STRIPES.get(name, 1))
        for name in ROUNDS
        if name in wanted
        for number in range(STRIPES.get(name, 1))
    ]
    walks = range(options.seed, options.seed + options.walks) if WALK in wanted else ()
    return found + [Task(WALK, number) for number in walks]


def search(options: argparse.Namespace, record: Path | None, folder: Path, score: Score) -> None:
    context = multiprocessing.get_context("spawn")
    tasks, answers = context.Queue(), context.Queue()
    wanted: list[Task | None] = [*tasks_of(options)]
    for task in [*wanted, *[None] * options.workers]:
        tasks.put(task)
    workers = [
        context.Process(target=_work, args=(options, folder / f"worker-{number}", tasks, answers))
        for number in range(options.workers)
    ]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    try:
        for answer in _answers(workers, answers):
            _take_in(score, answer, began, record)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join(60)
    score.failures += [f"a worker ended with {each.exitcode}" for each in workers if each.exitcode]
    if score.finished != len(wanted):
        score.failures.append(f"only {score.finished} of {len(wanted)} tasks were gone through")


def _answers(workers: Sequence[Any], answers: Any) -> Iterator[dict[str, Any]]:
    """Until all have ended."""
    while True:
        try:
            yield answers.get(timeout=1)
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                return


def _take_in(score: Score, answer: dict[str, Any], began: float, record: Path | None) -> None:
    match answer["what"]:
        case "say":
            say(answer["text"], began)
        case "finished":
            score.finished += 1
        case "skipped":
            score.skipped += answer["count"]
        case "failure":
            score.failures.append(answer["text"])
            say(f"FAILED {answer['text']}", began)
        case "passed":
            _count(score, answer)
            if record is not None and not answer["broken"]:
                with record.open("a") as lines:
                    lines.write(json.dumps({"key": answer["key"], "deaths": answer["deaths"]}) + "\n")
            reached = "" if answer["died"] else " (no such write)"
            say(f"{score.points.total() + score.walks}: {answer['key']}{reached}", began)


def _count(score: Score, answer: dict[str, Any]) -> None:
    score.samples += answer["samples"]
    score.deaths.update(answer["deaths"])
    for breach in answer["broken"]:
        score.breaches.append(breach)
        print(f"VIOLATION {breach}", flush=True)  # noqa: T201
    if answer.get("walk"):
        score.walks += 1
    else:
        score.points["not reached" if not answer["died"] else "after" if answer["landed"] else "before"] += 1


def say(what: str, began: float) -> None:
    """To whoever watches `make crash`."""
    print(f"[{time.monotonic() - began:6.0f} s] {what}", flush=True)  # noqa: T201


def record_of(options: argparse.Namespace) -> Path | None:
    """Where what was gone through is kept: of this very commit, if nothing was changed since."""
    if options.again:
        return None
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if changed.returncode or changed.stdout.strip() or commit.returncode:
        return None
    folder = cache_folder() / "crash"
    folder.mkdir(exist_ok=True)
    return folder / f"{commit.stdout.strip()[:16]}.jsonl"


def verdict(score: Score, options: argparse.Namespace, seconds: float) -> int:
    """The closing words, and 1 if anything is wrong."""
    for kind, count in sorted(score.deaths.items()):
        print(f"  died of {kind:<40}{count:>6}")  # noqa: T201
    whole = not (options.only or options.points)
    missing = sorted(LEAST_DEATHS - set(score.deaths)) if whole else []
    if missing:
        score.failures.append(f"nobody died of: {', '.join(missing)}")
    for failure in score.failures:
        print(f"FAILED {failure}")  # noqa: T201
    bad = bool(score.failures or score.breaches or (not score.samples and not score.skipped))
    print(  # noqa: T201
        f"crash: {'FAILED' if bad else 'ok'}: {score.points['before']} points before a write and "
        f"{score.points['after']} after it ({score.points['not reached']} beyond the last), {score.walks} walks, "
        f"{score.deaths.total()} deaths in all, {len(score.failures)} divergences or failures, {len(score.breaches)} violations in "
        f"{score.samples} samples, {score.skipped} gone through before, seed {options.seed}, {seconds:.0f} s"
    )
    return int(bad)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the walks, and of the points if not all are taken"
    )
    parser.add_argument("--points", type=int, default=0, help="at most so many of each chapter; 0 takes all")
    parser.add_argument("--walks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="of each walk")
    parser.add_argument(
        "--workers", type=int, default=5, help="sites side by side: each takes about half a core"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*ROUNDS, WALK], help="these rounds of chapters; walk: the walks"
    )
    parser.add_argument("--again", action="store_true", help="take again what this commit has been through")
    options = parser.parse_args(arguments)
    record = record_of(options)
    score = Score()
    options.done = []
    if record is not None and record.exists():
        for line in map(json.loads, record.read_text().splitlines()):
            options.done.append(line["key"])
            score.deaths.update(line["deaths"])
    began = time.monotonic()
    # Asked to end, as when interrupted: workers left behind would go on alone, each with its site.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    try:
        search(options, record, folder, score)
    except KeyboardInterrupt:
        score.failures.append("interrupted: what was gone through is kept if all of it was committed")
    if not score.failures:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict(score, options, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
