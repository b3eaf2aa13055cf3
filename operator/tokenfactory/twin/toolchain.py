"""The programs that a real control plane needs: found where they fit, else built once and kept.

Nothing here is downloaded as a binary. Kubernetes and etcd are one Go program (tools/controlplane)
whose every dependency is checked by go.sum; helm and kubeconform are `go install`ed at a pinned
version; promtool comes out of Debian's package, unpacked into the cache rather than installed.

What must stay true: a cached program is complete or absent (built aside, then renamed); two builds of
the same thing never run at once (a file lock, which `go` itself inherits, so that it holds even when
whoever started the build is killed); a build that was interrupted goes on where it stopped, because
Go keeps every package it has finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
"""What a cluster needs. `kubelet` is in our own program too, but is asked for by name only."""

EVERY_COMPONENT = (*CONTROL_PLANE, "kubelet")

_LWS = "sigs.k8s.io/lws"
_NO_SPACE = "no space left on device"
_NEEDED_BYTES = 500 * 1024 * 1024
_STILL_SECONDS = 30.0

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


@dataclass(frozen=True)
class Go:
    """A Go that fits, and what its builds are keyed by."""

    program: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.version}-{_platform_key()}"


def _platform_key() -> str:
    return f"{sys.platform}-{platform.machine()}"


def find_go() -> Go:
    """The Go on PATH, if it is of the one release line that works."""
    pin = pins()["go"]
    line, good = pin["line"], pin["known_good"]
    program = shutil.which("go")
    if program is None:
        raise ToolError(
            f"Go is not on PATH: the embedded control plane is built with Go {line}; "
            f"install it from https://go.dev/dl/#go{good} and try again, "
            "or set KUBEBUILDER_ASSETS to a folder with " + ", ".join(CONTROL_PLANE)
        )
    # Asked in the module's folder: go.mod may make Go switch to another toolchain.
    answer = subprocess.run(
        [program, "env", "GOVERSION"],
        cwd=tools_folder() / "controlplane",
        capture_output=True,
        text=True,
        check=False,
    )
    version = answer.stdout.strip()
    if answer.returncode != 0 or not version.startswith("go"):
        raise ToolError(f"`{program} env GOVERSION` failed: {answer.stderr.strip() or 'no answer'}")
    if not re.match(rf"go{re.escape(line)}(\.|$|[a-z])", version):
        why = ": with 1.27 `kubectl apply` fails" if version.startswith("go1.27") else ""
        raise ToolError(
            f"{program} is {version}, but only Go {line} builds a control plane that works{why}; "
            f"try again with GOTOOLCHAIN=go{good} in the environment (Go fetches that version itself), "
            f"or put Go {good} first on PATH"
        )
    return Go(program, version)


@contextlib.contextmanager
def _locked(name: str, say: Say) -> Iterator[int]:
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


def _check_space(folder: Path, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise _full_disk(folder, what)


def _full_disk(folder: Path, what: str) -> ToolError:
    return ToolError(
        f"the disk is full: building {what} in {folder} takes up to 4 GB with Go's build cache; "
        "free some (`go clean -cache` gives back Go's own), or set XDG_CACHE_HOME and GOCACHE to a "
        "bigger disk, and try again: what was built so far is kept"
    )


def _run_go(
    go: Go,
    arguments: list[str],
    *,
    what: str,
    cwd: Path,
    env: Mapping[str, str],
    lock: int,
    say: Say = say_on_stderr,
) -> None:
    """Run go, its errors explained. `lock` is inherited: no second build starts while this one lives."""
    try:
        building = subprocess.Popen(
            [go.program, *arguments],
            cwd=cwd,
            env={**os.environ, "CGO_ENABLED": "0", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
        )
    except OSError as error:
        raise ToolError(f"cannot run {go.program}: {error.strerror}") from error
    with building:
        printed = _wait_saying(building, what, say)
    if building.returncode == 0:
        return
    if _NO_SPACE in printed:
        raise _full_disk(cache_folder(), what)
    tail = "\n".join(printed.strip().splitlines()[-15:])
    hint = "try again: what was built so far is kept"
    if re.search(r"dial tcp|no such host|connection refused|i/o timeout|proxyconnect|TLS handshake", tail):
        hint = "Go could not fetch its modules: check the network and `go env GOPROXY`, then try again"
    elif "signal: killed" in tail:
        hint = "the compiler was killed, mostly for want of memory: try again with GOFLAGS=-p=1"
    raise ToolError(f"building {what} with {go.version} failed (`go {' '.join(arguments)}`):\n{tail}\n{hint}")


def _wait_saying(building: subprocess.Popen[str], what: str, say: Say) -> str:
    """What it printed, once it has ended; now and then a word that it goes on."""
    began = time.monotonic()
    while True:
        try:
            return building.communicate(timeout=_STILL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            say(f"  still building {what}: {time.monotonic() - began:.0f} s so far")
        except BaseException:
            building.kill()
            raise


@contextlib.contextmanager
def _published(folder: Path) -> Iterator[Path]:
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


# --- the control plane -------------------------------------------------------------------------


def ensure_control_plane(say: Say = say_on_stderr, *, needed: tuple[str, ...] = CONTROL_PLANE) -> Path:
    """A folder that holds a program of each name in `needed`: KUBEBUILDER_ASSETS, else built once."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets:
        missing = [name for name in needed if not os.access(Path(assets) / name, os.X_OK)]
        if not missing:
            return Path(assets)
        say(f"KUBEBUILDER_ASSETS={assets} lacks {', '.join(missing)}: using the embedded control plane")
    return _built_control_plane(say)


def _source_key(source: Path) -> str:
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum", "main.go"):
        digest.update((source / name).read_bytes())
    return digest.hexdigest()[:12]


def _built_control_plane(say: Say) -> Path:
    source = tools_folder() / "controlplane"
    stem = f"controlplane-{_source_key(source)}"
    try:
        go = find_go()
    except ToolError:
        # What was built is as good without the compiler that built it.
        for built in sorted(cache_folder().glob(f"{stem}-go*-{_platform_key()}")):
            return built
        raise
    folder = cache_folder() / f"{stem}-{go.key}"
    if folder.is_dir():
        return folder
    with _locked(stem, say) as lock:
        if not folder.is_dir():
            _build_control_plane(go, source, folder, lock, say)
    return folder


def _build_control_plane(go: Go, source: Path, folder: Path, lock: int, say: Say) -> None:
    version = kubernetes_version(source)
    say(
        f"building the embedded control plane (Kubernetes {version}) with {go.version} into {folder}: about "
        "6 minutes on 2 cores the first time, a minute after small changes; an interrupted build goes on"
    )
    _check_space(cache_folder(), "the control plane")
    major, minor = version.removeprefix("v").split(".")[:2]
    stamp = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())
    with _published(folder) as partial:
        _run_go(
            go,
            ["build", "-ldflags", f"-s -w {flags}", "-o", str(partial / "controlplane"), "."],
            what="the control plane",
            cwd=source,
            env={},
            lock=lock,
            say=say,
        )
        for name in EVERY_COMPONENT:
            (partial / name).symlink_to("controlplane")
    say(f"the embedded control plane is in {folder}")


def kubernetes_version(source: Path | None = None) -> str:
    """The pinned version, read from the one place that pins it."""
    text = ((source or tools_folder() / "controlplane") / "go.mod").read_text()
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)$", text, re.MULTILINE)
    if found is None:
        raise ToolError("tools/controlplane/go.mod does not require k8s.io/kubernetes")
    return found.group(1)


# --- LeaderWorkerSets --------------------------------------------------------------------------


def ensure_lws(say: Say = say_on_stderr) -> Path:
    """A folder with the controller of LeaderWorkerSets (`lws`) and how it is installed (`crd`, `webhook`)."""
    source = tools_folder() / "lws"
    digest = hashlib.sha256((source / "go.sum").read_bytes()).hexdigest()[:12]
    go = find_go()
    folder = cache_folder() / f"lws-{digest}-{go.key}"
    if folder.is_dir():
        return folder
    with _locked(f"lws-{digest}", say) as lock:
        if not folder.is_dir():
            say(f"building the controller of LeaderWorkerSets with {go.version}: some minutes, once")
            _check_space(cache_folder(), "the controller of LeaderWorkerSets")
            with _published(folder) as partial:
                build = ["build", "-ldflags", "-s -w", "-o", str(partial / "lws"), f"{_LWS}/cmd"]
                _run_go(go, build, what="lws", cwd=source, env={}, lock=lock)
                listed = _run_quietly([go.program, "list", "-m", "-f", "{{.Dir}}", _LWS], source)
                config = Path(listed.stdout.strip() or "nowhere") / "config"
                if not config.is_dir():
                    raise ToolError(f"{_LWS} cannot be found among Go's modules: {listed.stderr.strip()}")
                for part in ("crd/bases", "webhook"):
                    made = partial / part.partition("/")[0]
                    made.mkdir()
                    for file in (config / part).glob("*.yaml"):
                        (made / file.name).write_bytes(file.read_bytes())
    return folder


# --- helm and kubeconform ----------------------------------------------------------------------


def ensure_helm(say: Say = say_on_stderr) -> Path:
    return _ensure_go_tool("helm", ["version", "--template", "{{.Version}}"], say)


def ensure_kubeconform(say: Say = say_on_stderr) -> Path:
    return _ensure_go_tool("kubeconform", ["-v"], say)


def _ensure_go_tool(name: str, ask: list[str], say: Say) -> Path:
    pin = pins()[name]
    version = pin["version"]
    on_path = shutil.which(name)
    if on_path and _answer([on_path, *ask]).startswith(pin["accepts"]):
        return Path(on_path)
    folder = cache_folder() / f"{name}-{version}-{_platform_key()}"
    if (folder / name).exists():
        return folder / name
    go = find_go()
    with _locked(f"{name}-{version}", say) as lock:
        if not (folder / name).exists():
            say(f"building {name} {version} with {go.version}: about {pin['minutes']} minutes, once")
            _check_space(cache_folder(), name)
            with _published(folder) as partial:
                _run_go(
                    go,
                    ["install", f"{pin['package']}@{version}"],
                    what=name,
                    cwd=cache_folder(),
                    env={"GOBIN": str(partial), "GOFLAGS": "-ldflags=-s -ldflags=-w"},
                    lock=lock,
                    say=say,
                )
    return folder / name


def _answer(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


# --- promtool ----------------------------------------------------------------------------------


def ensure_promtool(say: Say = say_on_stderr) -> Path:
    return _ensure_debian_tool("promtool", "prometheus", say)


def ensure_prometheus(say: Say = say_on_stderr) -> Path:
    return _ensure_debian_tool("prometheus", "prometheus", say)


def _ensure_debian_tool(name: str, package: str, say: Say) -> Path:
    """On PATH, else out of Debian's package: unpacked into the cache, so nothing is installed or started."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    program = cache_folder() / f"debian-{package}-{_platform_key()}" / "usr" / "bin" / name
    if program.exists():
        return program
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ToolError(
            f"{name} is not on PATH and this is not a Debian system to take it from; "
            "install Prometheus (https://prometheus.io/download/, 2.42 or later) so that it is on PATH"
        )
    folder = program.parents[2]
    with _locked(f"debian-{package}", say):
        if not program.exists():
            say(f"unpacking Debian's package {package} into {folder} for {name}: about a minute, once")
            with _published(folder) as partial:
                _unpack_debian(package, partial, say)
    return program


def _unpack_debian(package: str, into: Path, say: Say) -> None:
    download = ["apt-get", "download", "-q", package]
    done = _run_quietly(download, into)
    if done.returncode != 0 and os.geteuid() == 0:
        say("apt-get knows no such package yet: running apt-get update")
        _run_quietly(["apt-get", "update", "-q"], into)
        done = _run_quietly(download, into)
    archives = sorted(into.glob("*.deb"))
    if done.returncode != 0 or not archives:
        raise ToolError(
            f"`{' '.join(download)}` failed: {done.stderr.strip() or done.stdout.strip()}\n"
            f"run `apt-get update` as root and try again, or install {package} so that it is on PATH"
        )
    unpacked = _run_quietly(["dpkg-deb", "-x", archives[0].name, "."], into)
    if unpacked.returncode != 0:
        raise ToolError(f"cannot unpack {archives[0].name}: {unpacked.stderr.strip()}")
    for archive in archives:
        archive.unlink()


def _run_quietly(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
