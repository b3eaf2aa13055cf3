"""A real Kubernetes control plane in a folder, on loopback, beside any number of others.

`Cluster.up(folder)` starts etcd, kube-apiserver, kube-controller-manager and kube-scheduler under a
supervisor (supervisor.py) that ends them when the caller ends, however it ends. Everything of a cluster is
in its folder: certificates, kubeconfigs, data, logs, audit log.

Ports are never raced for: each is bound here first with SO_REUSEPORT and stays bound, unlistened, in the
supervisor for as long as the cluster lives; the component binds the same port beside it. So a restarted
API server finds its port, and nobody else gets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenfactory.twin import components, supervisor, toolchain
from tokenfactory.twin.components import ClusterOptions, Plan, Ports
from tokenfactory.twin.pki import Authority

__all__ = ["Cluster", "ClusterError", "ClusterOptions"]

_START_SECONDS = 120.0  # a limit, not an expectation: 8 s is usual, a busy machine may take longer
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_SUPERVISED = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


class ClusterError(RuntimeError):
    """The cluster cannot do this. The text says why and where to look."""


class Cluster:
    """One running cluster. Also a context manager: leaving it is `down()`."""

    def __init__(self, plan: Plan, owned: subprocess.Popen[bytes] | None = None) -> None:
        self._plan = plan
        self._owned = owned
        self._number = 0
        self.folder = plan.folder
        self.server = plan.server
        self.kubeconfig = self.folder / "admin.kubeconfig"

    # --- life -------------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        folder: Path,
        options: ClusterOptions | None = None,
        *,
        detached: bool = False,
        say: toolchain.Say = toolchain.say_on_stderr,
    ) -> Self:
        """Start a cluster in `folder`; what an earlier one there kept (objects, certificates) is there again.

        It ends with this process, or, `detached`, with `Cluster.attach(folder).down()`.
        """
        options = options or ClusterOptions()
        folder = folder.absolute()
        binaries = toolchain.ensure_control_plane(say)
        for name in ("", "components", "logs", "users", "audit"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            lock = _lock_folder(folder, held)
            ports, sockets = _reserve_ports(folder, options, held)
            plan = Plan(folder, binaries, options, ports, Authority(folder / "pki"))
            _write_plan(plan)
            owned = _spawn_supervisor(folder, (lock, *sockets), detached=detached)
        cluster = cls(plan, owned)
        try:
            cluster._start_all()
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def attach(cls, folder: Path) -> Self:
        """The cluster that runs in `folder`, started by whomever."""
        folder = folder.absolute()
        try:
            saved = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            raise ClusterError(
                f"there is no cluster in {folder}: start one with `tokenfactory cluster up`"
            ) from None
        options = {
            **saved["options"],
            "extra_addresses": tuple(saved["options"]["extra_addresses"]),
            "extra_args": {key: tuple(value) for key, value in saved["options"]["extra_args"].items()},
        }
        plan = Plan(
            folder,
            Path(saved["bin"]),
            ClusterOptions(**options),
            Ports(**saved["ports"]),
            Authority(folder / "pki"),
        )
        return cls(plan)

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
        try:
            state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            return {}
        return state

    def running(self) -> dict[str, int]:
        """The pids of the components that are alive now, by name."""
        return {
            name: component["pid"]
            for name, component in self.state().get("components", {}).items()
            if "pid" in component and supervisor.start_time(component["pid"]) == component["started"]
        }

    def _start_all(self) -> None:
        options = self._plan.options
        self.start_component("etcd")
        self.start_component("kube-apiserver")
        if options.controller_manager:
            self.start_component("kube-controller-manager")
        if options.scheduler:
            self.start_component("kube-scheduler")
        if options.controller_manager:
            path = "/api/v1/namespaces/default/serviceaccounts/default"
            self._wait(
                "kube-controller-manager", "make the default service account", lambda: self._found(path)
            )

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
        _write_component(self.folder, name, argv, env=env, cwd=cwd)
        self._command(do="start", name=name)

    def program(self, name: str) -> Path:
        """One of our programs: kubelet, kubectl, …"""
        path = self._plan.bin / name
        return path if path.exists() else toolchain.ensure_control_plane(needed=(name,)) / name

    def _command(self, **command: Any) -> None:
        # Counted on from what was answered, so that several attached processes do not confuse it.
        number = max(self._number, int(self.state().get("answered", 0))) + 1
        self._number = number
        try:
            control = os.open(self.folder / "control", os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ClusterError(f"the cluster in {self.folder} does not run") from error
        with os.fdopen(control, "wb") as pipe:
            pipe.write(json.dumps({**command, "number": number}).encode() + b"\n")
        deadline = time.monotonic() + _STOP_SECONDS
        while (state := self.state())["answered"] < number:
            self._check_supervisor(state)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the supervisor of {self.folder} does not answer: see logs/supervisor.log"
                )
            time.sleep(_POLL_SECONDS / 4)
        if state["error"]:
            raise ClusterError(state["error"])

    def _check_supervisor(self, state: Mapping[str, Any]) -> None:
        process = state["supervisor"]
        if supervisor.start_time(process["pid"]) != process["started"]:
            raise ClusterError(f"the supervisor of {self.folder} has ended: see logs/supervisor.log")

    def _wait(self, name: str, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not done():
            component = self.state().get("components", {}).get(name, {})
            if "pid" not in component:
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

    # --- talking to it ----------------------------------------------------------------------

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002  as subprocess.run has it
        check: bool = True,
        kubeconfig: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Our own kubectl, as cluster-admin or whoever `kubeconfig` says; `check` raises with what it printed."""
        done = subprocess.run(
            [str(self.program("kubectl")), *args],
            input=input,
            env={
                **os.environ,
                "KUBECONFIG": str(kubeconfig or self.kubeconfig),
                "KUBERC": "off",
                # Kubectl's cache goes by host and port, which another cluster may have had before.
                "KUBECACHEDIR": str(self.folder / "kubectl-cache"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise ClusterError(
                f"kubectl {' '.join(args)} failed:\n{done.stderr.strip() or done.stdout.strip()}"
            )
        return done

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One HTTPS request as cluster-admin: the status and the decoded answer."""
        connection = http.client.HTTPSConnection(
            self._plan.host, self._plan.ports.apiserver, context=self._tls(), timeout=30
        )
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            return answer.status, json.loads(text)
        return answer.status, text.decode(errors="replace")

    def _tls(self) -> ssl.SSLContext:
        authority = self._plan.authority
        admin = authority.client("admin", "tokenfactory-admin", ("system:masters",))
        context = ssl.create_default_context(cafile=str(authority.ca.certificate))
        context.load_cert_chain(admin.certificate, admin.key)
        return context

    def _found(self, path: str) -> bool:
        try:
            return self.request("GET", path)[0] == http.HTTPStatus.OK
        except OSError:
            return False

    # --- who one is -------------------------------------------------------------------------

    def kubeconfig_for(self, user: str, groups: tuple[str, ...] | list[str] = ()) -> Path:
        """A kubeconfig with a client certificate for this user. RBAC decides what it may do."""
        identity = json.dumps([user, *groups])
        name = f"{_slug(user)}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        pair = self._plan.authority.client(name, user, tuple(groups))
        return self._write_kubeconfig(name, components.certificate_user(pair))

    def kubeconfig_for_service_account(
        self,
        namespace: str,
        name: str,
        node_name: str | None = None,
        duration: str = "1h",
        *,
        pod: str | None = None,
    ) -> Path:
        """A kubeconfig with a real token of a service account, from the TokenRequest API.

        With `node_name` the token is bound to a pod on that node, made here unless `pod` names one there:
        it carries the node's name, as the token of a DaemonSet's pod does, and dies with the pod.
        """
        request: dict[str, Any] = {"audiences": [components.ISSUER], "expirationSeconds": _seconds(duration)}
        if node_name is not None and pod is None:
            pod = self._make_pod(namespace, name, node_name)
        if pod is not None:
            request["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod}
        token = self._must(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": request},
        )["status"]["token"]
        file = "-".join(_slug(part) for part in ("sa", namespace, name, node_name or "", pod or "") if part)
        return self._write_kubeconfig(file, {"token": token}, namespace)

    def _make_pod(self, namespace: str, service_account: str, node_name: str) -> str:
        name = f"{service_account}-{node_name}"
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "serviceAccountName": service_account,
                "nodeName": node_name,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "main", "image": "tokenfactory.dev/none"}],
            },
        }
        status, answer = self.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
        if status not in {http.HTTPStatus.CREATED, http.HTTPStatus.CONFLICT}:
            raise ClusterError(
                f"cannot make a pod for a token of {namespace}/{service_account}: {_message(answer)}"
            )
        return name

    def _must(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.request(method, path, body)
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise ClusterError(f"{method} {path}: {status} {_message(answer)}")
        return answer

    def _write_kubeconfig(self, name: str, user: dict[str, object], namespace: str = "default") -> Path:
        path = self.folder / "users" / f"{name}.kubeconfig"
        _write_private(path, components.kubeconfig(self.server, self._plan.authority, user, namespace))
        return path

    # --- the audit log ----------------------------------------------------------------------

    def audit_verbs(self) -> Iterator[tuple[str, str, str, str, str]]:
        """(user, verb, API group, resource, subresource) of every request in the log, oldest first.

        The control plane's own requests are not logged, and the oldest go when the log is full.
        """
        folder = self.folder / "audit"
        current = folder / "audit.log"
        older = sorted(path for path in folder.glob("audit-*.log"))
        for path in (*older, current):
            if not path.exists():
                continue
            with path.open(encoding="utf-8") as log:
                for line in log:
                    if not line.endswith("\n"):  # still being written
                        break
                    event = json.loads(line)
                    what = event.get("objectRef") or {}
                    yield (
                        event["user"].get("username", ""),
                        event["verb"],
                        what.get("apiGroup", ""),
                        what.get("resource", ""),
                        what.get("subresource", ""),
                    )


# --- making the folder ---------------------------------------------------------------------------


def _lock_folder(folder: Path, held: contextlib.ExitStack) -> int:
    """The lock that the supervisor holds for life: one cluster per folder."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ClusterError(
            f"a cluster runs in {folder} already: use it (KUBECONFIG={folder}/admin.kubeconfig), "
            "end it with `tokenfactory cluster down`, or choose another folder"
        ) from None
    return lock


def _reserve_ports(
    folder: Path, options: ClusterOptions, held: contextlib.ExitStack
) -> tuple[Ports, tuple[int, ...]]:
    """Three bound, unlistened sockets; the same ports as last time in this folder, where they are free."""
    before: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        before = json.loads((folder / "cluster.json").read_text())["ports"]
    ports: dict[str, int] = {}
    descriptors: list[int] = []
    for name in (field.name for field in dataclasses.fields(Ports)):
        address = options.bind_address if name == "apiserver" else "127.0.0.1"
        bound = held.enter_context(_bind(address, before.get(name, 0)))
        ports[name] = bound.getsockname()[1]
        descriptors.append(bound.fileno())
    return Ports(**ports), tuple(descriptors)


def _bind(address: str, port: int) -> socket.socket:
    def attempt(number: int) -> socket.socket:
        candidate = socket.socket()
        # Without sharing first: with it, the bind would also succeed on another cluster's reserved port.
        try:
            if number:
                with socket.socket() as alone:
                    # Connections that linger from our own last run do not count.
                    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    alone.bind((address, number))
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            candidate.bind((address, number))
        except OSError:
            candidate.close()
            raise
        return candidate

    try:
        return attempt(port)
    except OSError as error:
        if not port:
            raise ClusterError(f"cannot listen on {address}: {error.strerror}") from error
    return attempt(0)


def _write_plan(plan: Plan) -> None:
    """Everything the supervisor and `attach` read, before anything is started."""
    folder, authority, server = plan.folder, plan.authority, plan.server
    identities = {
        "admin": ("tokenfactory-admin", ("system:masters",)),
        "controller-manager": ("system:kube-controller-manager", ()),
        "scheduler": ("system:kube-scheduler", ()),
    }
    for name, (user, groups) in identities.items():
        pair = authority.client(name, user, groups)
        text = components.kubeconfig(server, authority, components.certificate_user(pair))
        _write_private(folder / f"{name}.kubeconfig", text)
    commands = {
        "etcd": components.etcd(plan),
        "kube-apiserver": components.apiserver(plan),
        "kube-controller-manager": components.controller_manager(
            plan, folder / "controller-manager.kubeconfig"
        ),
        "kube-scheduler": components.scheduler(plan, folder / "scheduler.kubeconfig"),
    }
    for name, argv in commands.items():
        _write_component(folder, name, argv)
    saved = {
        "bin": str(plan.bin),
        "ports": dataclasses.asdict(plan.ports),
        "options": dataclasses.asdict(plan.options),
        "server": server,
    }
    (folder / "cluster.json").write_text(json.dumps(saved, indent=1))


def _write_component(
    folder: Path, name: str, argv: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    spec = {"argv": argv, "env": dict(env or {}), "cwd": str(cwd) if cwd else None}
    (folder / "components" / f"{name}.json").write_text(json.dumps(spec, indent=1))


def _spawn_supervisor(
    folder: Path, kept: tuple[int, ...], *, detached: bool
) -> subprocess.Popen[bytes] | None:
    control = folder / "control"
    if not control.exists():
        os.mkfifo(control, 0o600)
    (folder / "state.json").unlink(missing_ok=True)
    owner = 0 if detached else os.getpid()
    with (folder / "logs" / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            # -I -S: nothing of the caller's environment can break the one process that must clean up.
            [sys.executable, "-I", "-S", supervisor.__file__, str(folder), str(owner)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=kept,
        )
    deadline = time.monotonic() + _STOP_SECONDS
    while not (folder / "state.json").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise ClusterError(f"the supervisor did not start: see {folder}/logs/supervisor.log")
        time.sleep(_POLL_SECONDS / 4)
    return None if detached else process


def _write_private(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.rename(path)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _seconds(duration: str) -> int:
    from tokenfactory.api import quantities

    return int(quantities.parse_duration(duration)) // 1000


def _message(answer: Any) -> str:
    return str(answer.get("message", answer)) if isinstance(answer, dict) else str(answer)
