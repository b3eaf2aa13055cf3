"""Starts and ends the processes of one cluster, and ends them when their owner ends.

Run as a program of its own (`python supervisor.py FOLDER OWNER_PID`), in a session of its own, with the
standard library only. What must stay true:

- Owner gone, however it went (return, Ctrl-C, kill -9): every component is ended. The owner is watched
  through a pidfd, so a recycled pid cannot stand in for it. `detach` means: no owner any more, only
  SIGTERM (`cluster down`) ends it.
- Supervisor gone by kill -9: the kernel kills the components (PR_SET_PDEATHSIG).
- Nobody outside is ever signalled by a bare pid: the state file pairs each with its start time.

Commands come as lines through a FIFO (`control`), answers are the state file (`state.json`, replaced
atomically, with the last commands carried out). A FIFO has no path limit like a Unix
socket's and lets in only who may write the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_OWNER_POLL_SECONDS = 1.0  # only where there are no pidfds
_GRACE_SECONDS = 3.0
_ANSWERS_KEPT = 32


def start_time(pid: int) -> str | None:
    """What tells this process from a later one with the same pid; None when there is none (or a zombie)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:  # noqa: PTH123
            fields = stat.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:  # noqa: PTH123
            return None if fields[0] in "ZX" else f"{boot.read().strip()}/{fields[19]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    asked = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    shown = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return None if not shown or shown.startswith("Z") else shown.partition(" ")[2].strip()


def signal_process(pid: int, started: str, number: int) -> bool:
    """Signal that very process; False when it is gone. Race-free where the kernel has pidfds."""
    if not hasattr(os, "pidfd_open"):
        if start_time(pid) != started:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return True
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Checked after the pidfd is held: from here on it can only mean the process we looked at.
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


class Supervisor:
    """The components of one folder. Single-threaded: every change happens in `run`'s loop."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder = folder
        self.owner = owner
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.started: dict[str, str] = {}
        self.ended: dict[str, int] = {}
        self.answers: dict[str, str] = {}
        self.ending = False
        self.pending = b""

    def run(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)
        # Opened for writing too, so that it never reports end of file between two writers.
        control = os.open(self.folder / "control", os.O_RDWR | os.O_NONBLOCK)
        owner = self._watch_owner()
        self._write_state()
        while not self.ending and not self._owner_gone():
            watched = [control, wake_read, *([owner] if self.owner and owner is not None else [])]
            poll = _OWNER_POLL_SECONDS if self.owner and owner is None else None
            ready, _, _ = select.select(watched, [], [], poll)
            if wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 4096)
            self._reap()
            if control in ready:
                self._obey(os.read(control, 65536))
        self.end_all()

    def _end(self, *_: object) -> None:
        self.ending = True

    def _watch_owner(self) -> int | None:
        if not hasattr(os, "pidfd_open"):
            return None
        try:
            return os.pidfd_open(self.owner)
        except OSError:
            self.ending = True
            return None

    def _owner_gone(self) -> bool:
        # The owner is our parent: once it is gone we are somebody else's child. Also asked before the
        # first wait, or a pid recycled before the pidfd was opened would be watched in the owner's place.
        return bool(self.owner) and os.getppid() != self.owner

    def _reap(self) -> None:
        changed = False
        for name, child in list(self.children.items()):
            if child.poll() is not None:
                del self.children[name]
                self.ended[name] = child.returncode
                changed = True
        if changed:
            self._write_state()

    def _obey(self, received: bytes) -> None:
        *lines, self.pending = (self.pending + received).split(b"\n")
        for line in lines:
            command: dict[str, Any] = json.loads(line)
            try:
                self._carry_out(command)
                answer = ""
            except Exception as error:
                answer = f"{command.get('do')} {command.get('name', '')}: {error}"
            self.answers[command["id"]] = answer
            while len(self.answers) > _ANSWERS_KEPT:
                del self.answers[next(iter(self.answers))]
            self._write_state()

    def _carry_out(self, command: dict[str, Any]) -> None:
        match command["do"]:
            case "start":
                self._start(command["name"])
            case "stop":
                self._stop([command["name"]], kill=command.get("kill", False))
            case "detach":
                self.owner = 0

    def _start(self, name: str) -> None:
        if name in self.children:
            return
        spec = json.loads((self.folder / "components" / f"{name}.json").read_text())
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                spec["argv"],
                cwd=spec.get("cwd") or self.folder,
                env={**os.environ, **spec.get("env", {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent(os.getpid()),  # noqa: PLW1509  there are no threads here
            )
        self.children[name] = child
        self.started[name] = start_time(child.pid) or ""
        self.ended.pop(name, None)

    def _stop(self, names: list[str], *, kill: bool = False) -> None:
        """End these, politely unless `kill`, and wait until they are gone."""
        for name in names:
            if name in self.children:
                self.children[name].send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for name in names:
            child = self.children.pop(name, None)
            if child is None:
                continue
            try:
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            self.ended[name] = child.returncode

    def end_all(self) -> None:
        """Everything that talks to the API server goes before it, and etcd last."""
        for last in (("kube-apiserver", "etcd"), ("etcd",), ()):
            self._stop([name for name in self.children if name not in last])
        self._write_state()

    def _write_state(self) -> None:
        state = {
            "supervisor": {"pid": os.getpid(), "started": start_time(os.getpid())},
            "owner": self.owner,
            "answers": self.answers,
            "components": {
                **{name: {"exit": code} for name, code in self.ended.items()},
                **{
                    name: {"pid": child.pid, "started": self.started[name]}
                    for name, child in self.children.items()
                },
            },
        }
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps(state))
        partial.rename(self.folder / "state.json")


def _die_with_parent(parent: int) -> Any:
    """For the child, between fork and exec: the kernel kills it when the supervisor dies."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we had asked
            os._exit(1)

    return arrange


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1]), int(sys.argv[2])).run()
