"""A real Kubernetes control plane in a folder, on loopback, beside any number of others.

`Cluster.up(folder)` starts etcd, kube-apiserver, kube-controller-manager and kube-scheduler under a
supervisor (supervisor.py) that ends them when the caller ends, however it ends. Everything of a cluster is
in its folder (cluster_folder.py): certificates, kubeconfigs, data, logs, audit log. How one talks to it
is in access.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenfactory.twin import cluster_folder, supervisor, toolchain
from tokenfactory.twin.access import Access
from tokenfactory.twin.components import ClusterError, ClusterOptions, Plan
from tokenfactory.twin.pki import Authority
from tokenfactory.twin.workshop import Say, say_on_stderr

__all__ = ["Cluster", "ClusterError", "ClusterOptions"]

_START_SECONDS = 120.0  # a limit, not an expectation: 4 s is usual, a busy machine may take longer
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02


class Cluster(Access):
    """One running cluster. Also a context manager: leaving it is `down()`."""

    def __init__(self, plan: Plan, owned: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__(plan)
        self._owned = owned

    # --- life -------------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        folder: Path,
        options: ClusterOptions | None = None,
        *,
        detached: bool = False,
        say: Say = say_on_stderr,
    ) -> Self:
        """Start a cluster in `folder`; what an earlier one there kept (objects, certificates) is there again.

        It ends with this process, or, `detached`, with `Cluster.attach(folder).down()`.
        """
        options = options or ClusterOptions()
        folder = folder.absolute()
        binaries = toolchain.ensure_control_plane(say)
        cluster_folder.make(folder)
        with contextlib.ExitStack() as held:
            lock = cluster_folder.lock(folder, held)
            ports, sockets = cluster_folder.reserve_ports(folder, options, held)
            plan = Plan(folder, binaries, options, ports, Authority(folder / "pki"))
            cluster_folder.write(plan)
            owned = _spawn_supervisor(folder, (lock, *sockets))
        cluster = cls(plan, owned)
        try:
            cluster._start_all()
            if detached:
                cluster._command(do="detach")
                cluster._owned = None
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def attach(cls, folder: Path) -> Self:
        """The cluster in `folder`, started by whomever. Leaving it as a context manager ends it too."""
        return cls(cluster_folder.read(folder.absolute()))

    @classmethod
    def join(cls, folder: Path) -> Self:
        """The cluster that runs in `folder`, or that somebody is starting there, once it is ready."""
        folder = folder.absolute()
        deadline = time.monotonic() + _START_SECONDS
        # Whoever holds the lock may not have written its files yet: those there may be of an earlier run,
        # until a component lives.
        while "kube-apiserver" not in _running(_state(folder)):
            if not cluster_folder.is_locked(folder) or time.monotonic() > deadline:
                raise ClusterError(f"the cluster in {folder} does not run, or lost its API server: see logs/")
            time.sleep(_POLL_SECONDS)
        cluster = cls.attach(folder)
        cluster.wait_until_ready()
        return cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def down(self) -> None:
        """End what was started, and only that; the folder stays. Doing it again does nothing."""
        state = self.state()
        of_supervisor = state.get("supervisor")
        if of_supervisor and supervisor.signal_process(
            of_supervisor["pid"], of_supervisor["started"], signal.SIGTERM
        ):
            self._wait_gone(of_supervisor)
        if self._owned is not None:
            self._owned.wait(timeout=_STOP_SECONDS)
        # Left only where the supervisor was killed and the kernel cannot tie its children to it.
        for component in self.state().get("components", {}).values():
            if "pid" in component:
                supervisor.signal_process(component["pid"], component["started"], signal.SIGKILL)

    def _wait_gone(self, process: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        while supervisor.start_time(process["pid"]) == process["started"]:
            if time.monotonic() > deadline:
                supervisor.signal_process(process["pid"], process["started"], signal.SIGKILL)
                return
            time.sleep(_POLL_SECONDS)

    def state(self) -> dict[str, Any]:
        """What the supervisor last wrote: processes by name. Empty before the first start."""
        return _state(self.folder)

    def running(self) -> dict[str, int]:
        """The pids of the components that are alive now, by name."""
        return _running(self.state())

    def _start_all(self) -> None:
        options = self._plan.options
        self.start_component("etcd")
        self.start_component("kube-apiserver")
        if options.controller_manager:
            self.start_component("kube-controller-manager")
        if options.scheduler:
            self.start_component("kube-scheduler")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until the API server serves and, with a controller manager, pods can be made in `default`."""
        self._wait("kube-apiserver", "be ready", lambda: self._found("/readyz"))
        if self._plan.options.controller_manager:
            path = "/api/v1/namespaces/default/serviceaccounts/default"
            self._wait("kube-controller-manager", "make its first account", lambda: self._found(path))

    # --- components -------------------------------------------------------------------------

    def start_component(self, name: str) -> None:
        """Start one and wait until it serves. Already running is fine."""
        self._command(do="start", name=name)
        if name == "etcd":
            self._wait(name, "listen", self._etcd_listens)
        elif name == "kube-apiserver":
            self._wait(name, "be ready", lambda: self._found("/readyz"))

    def stop_component(self, name: str, *, kill: bool = False) -> None:
        """Stop one, politely or with `kill` (SIGKILL), and wait until it is gone. Its port stays ours."""
        self._command(do="stop", name=name, kill=kill)

    def run_component(
        self, name: str, argv: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        """One more process under the cluster's supervisor, such as a kubelet; its log is logs/NAME.log."""
        cluster_folder.write_component(self.folder, name, argv, env=env, cwd=cwd)
        self._command(do="start", name=name)

    def _command(self, **command: Any) -> None:
        """Have the supervisor do this, and wait until it has."""
        token = secrets.token_hex(8)
        try:
            control = os.open(self.folder / "control", os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ClusterError(f"the cluster in {self.folder} does not run") from error
        with os.fdopen(control, "wb") as pipe:
            pipe.write(json.dumps({**command, "id": token}).encode() + b"\n")
        deadline = time.monotonic() + _STOP_SECONDS
        while token not in (state := self.state())["answers"]:
            self._check_supervisor(state)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the supervisor of {self.folder} does not answer: see logs/supervisor.log"
                )
            time.sleep(_POLL_SECONDS / 4)
        if state["answers"][token]:
            raise ClusterError(state["answers"][token])

    def _check_supervisor(self, state: Mapping[str, Any]) -> None:
        process = state["supervisor"]
        if supervisor.start_time(process["pid"]) != process["started"]:
            raise ClusterError(f"the supervisor of {self.folder} has ended: see logs/supervisor.log")

    def _wait(self, name: str, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not done():
            component = self.state().get("components", {}).get(name, {})
            if "exit" in component:
                raise ClusterError(f"{name} ended before it could {what}:\n{self.log_tail(name)}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{name} did not {what} in {_START_SECONDS:.0f} s:\n{self.log_tail(name)}")
            time.sleep(_POLL_SECONDS)

    def log_tail(self, name: str, lines: int = 15) -> str:
        path = self.folder / "logs" / f"{name}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join([*text.splitlines()[-lines:], f"(all of it: {path})"])

    def _etcd_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._plan.ports.etcd)) == 0


def _state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        return {}
    return state


def _running(state: Mapping[str, Any]) -> dict[str, int]:
    return {
        name: component["pid"]
        for name, component in state.get("components", {}).items()
        if "pid" in component and supervisor.start_time(component["pid"]) == component["started"]
    }


def _spawn_supervisor(folder: Path, kept: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start it, owned by this process, with the descriptors that it holds for the cluster's life."""
    control = folder / "control"
    if not control.exists():
        os.mkfifo(control, 0o600)
    (folder / "state.json").unlink(missing_ok=True)
    with (folder / "logs" / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            # -I -S: nothing of the caller's environment can break the one process that must clean up.
            [sys.executable, "-I", "-S", supervisor.__file__, str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=kept,
        )
    try:
        _wait_for_state(folder, process)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process


def _wait_for_state(folder: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while not (folder / "state.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ClusterError(f"the supervisor did not start: see {folder}/logs/supervisor.log")
        time.sleep(_POLL_SECONDS / 4)
