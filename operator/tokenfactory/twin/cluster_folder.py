"""The folder of a cluster: its lock, its reserved ports, and the files that start it and find it again.

Ports are never raced for: each is bound here first with SO_REUSEPORT and stays bound, unlistened, in the
supervisor for as long as the cluster lives; the component binds the same port beside it. So a restarted
API server finds its port, and nobody else gets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from tokenfactory.twin import components
from tokenfactory.twin.components import AlreadyRunsError, ClusterError, ClusterOptions, Plan, Ports
from tokenfactory.twin.pki import Authority

_LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class _Saved:
    """cluster.json: what cannot be worked out again."""

    bin: str
    options: ClusterOptions
    ports: Ports


def make(folder: Path) -> None:
    for name in ("", "components", "logs", "users", "audit"):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)


def lock(folder: Path, held: contextlib.ExitStack) -> int:
    """The lock that the supervisor inherits and holds for life: one cluster per folder."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyRunsError(
            f"a cluster runs in {folder} already: use it (KUBECONFIG={folder}/admin.kubeconfig), "
            "end it with `tokenfactory cluster down`, or choose another folder"
        ) from None
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether a supervisor lives there."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def reserve_ports(
    folder: Path, options: ClusterOptions, held: contextlib.ExitStack
) -> tuple[Ports, tuple[int, ...]]:
    """Bound, unlistened sockets; the same ports as last time in this folder, where they are free."""
    before: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
        before = dataclasses.asdict(_load(folder).ports)
    ports: dict[str, int] = {}
    descriptors: list[int] = []
    for name in (field.name for field in dataclasses.fields(Ports)):
        address = options.bind_address if name == "apiserver" else _LOOPBACK
        bound = held.enter_context(_reserve(address, before.get(name, 0)))
        ports[name] = bound.getsockname()[1]
        descriptors.append(bound.fileno())
    return Ports(**ports), tuple(descriptors)


def _reserve(address: str, wanted: int) -> socket.socket:
    if wanted and _is_free(address, wanted):
        with contextlib.suppress(OSError):
            return _bind(address, wanted)
    try:
        return _bind(address, 0)
    except OSError as error:
        raise ClusterError(
            f"cannot listen on {address}: {error.strerror}; bind_address must be an address of this machine"
        ) from error


def _bind(address: str, port: int) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


def _is_free(address: str, port: int) -> bool:
    """Bound without sharing, since a shared bind would succeed on another cluster's reserved port too."""
    with socket.socket() as alone:
        # Connections that linger from the last run do not count.
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            alone.bind((address, port))
        except OSError:
            return False
    return True


def write(plan: Plan) -> None:
    """Everything that the supervisor and `read` need, before anything is started."""
    folder, authority = plan.folder, plan.authority
    for name, (user, groups) in components.IDENTITIES.items():
        identity = components.certificate_user(authority.client(name, user, groups))
        text = components.kubeconfig(plan.server, authority, identity)
        write_private(folder / f"{name}.kubeconfig", text)
    commands = {
        "etcd": components.etcd(plan),
        "kube-apiserver": components.apiserver(plan),
        "kube-controller-manager": components.controller_manager(plan),
        "kube-scheduler": components.scheduler(plan),
    }
    for name, argv in commands.items():
        write_component(folder, name, argv)
    saved = msgspec.json.encode(_Saved(str(plan.bin), plan.options, plan.ports))
    write_private(folder / "cluster.json", saved.decode())


def read(folder: Path) -> Plan:
    try:
        saved = _load(folder)
    except FileNotFoundError:
        raise ClusterError(
            f"there is no cluster in {folder}: start one with `tokenfactory cluster up`"
        ) from None
    except msgspec.MsgspecError as error:
        raise ClusterError(
            f"{folder}/cluster.json is not of this version of tokenfactory ({error}): "
            "end that cluster with the version that started it, or remove the folder"
        ) from error
    return Plan(folder, Path(saved.bin), saved.options, saved.ports, Authority(folder / "pki"))


def _load(folder: Path) -> _Saved:
    return msgspec.json.decode((folder / "cluster.json").read_bytes(), type=_Saved)


def write_component(
    folder: Path, name: str, argv: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    """What the supervisor's `start NAME` runs."""
    spec = {"argv": argv, "env": dict(env or {}), "cwd": str(cwd) if cwd else None}
    write_private(folder / "components" / f"{name}.json", json.dumps(spec, indent=1))


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and for nobody else to read."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.rename(path)
