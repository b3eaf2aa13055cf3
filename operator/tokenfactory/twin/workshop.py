"""Where programs are made and kept: the cache, its locks, and the pins of what goes into it.

What must stay true: what is in the cache is complete or absent (made aside, then renamed); the same thing is never made
twice at once. The lock is one of the file system, which a compiler inherits: it holds even when whoever started the build
is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
"""What a cluster needs. `kubelet` is in our own program too, but is asked for by name only."""

_NEEDED_BYTES = 500 * 1024 * 1024

Say = Callable[[str], None]


class ToolError(RuntimeError):
    """A tool cannot be had. The text says why, and what to try next."""


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  a build of minutes must not be silent


def cache_folder() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/tokenfactory`, made when missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "tokenfactory"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(
            f"cannot make the cache folder {folder}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that you may write"
        ) from error
    return folder


def tools_folder() -> Path:
    """The checkout's tools/: sources and pins. Not part of an installed wheel."""
    folder = Path(__file__).resolve().parents[3] / "tools"
    if not (folder / "versions.toml").is_file():
        raise ToolError(
            f"{folder} is not there: the embedded control plane is built from a checkout of Token Factory; "
            "run from one, or set KUBEBUILDER_ASSETS to a folder with " + ", ".join(CONTROL_PLANE)
        )
    return folder


def pins() -> Mapping[str, Any]:
    return tomllib.loads((tools_folder() / "versions.toml").read_text())


def platform_key() -> str:
    return f"{sys.platform}-{platform.machine()}"


@contextlib.contextmanager
def locked(name: str, say: Say) -> Iterator[int]:
    """One at a time over all processes of this user; yields the lock's descriptor for children."""
    path = cache_folder() / f"{name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name}: another process is building it; waiting for that to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def check_space(folder: Path, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise full_disk(folder, what)


def full_disk(folder: Path, what: str) -> ToolError:
    return ToolError(
        f"the disk is full: building {what} in {folder} takes up to 4 GB with Go's build cache; "
        "free some (`go clean -cache` gives back Go's own), or set XDG_CACHE_HOME and GOCACHE to a "
        "bigger disk, and try again: what was built so far is kept"
    )


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder to build into that takes its final name only when the block succeeds.

    Call it under the lock: leftovers of killed builds are swept first.
    """
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise ToolError(f"cannot write to {folder.parent}: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_quietly(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
