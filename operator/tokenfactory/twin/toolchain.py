"""The programs that a real control plane needs: found where they fit, else built once and kept.

Nothing here is downloaded as a binary. Kubernetes and etcd are one Go program (tools/controlplane)
whose every dependency is checked by go.sum; helm and kubeconform are `go install`ed at a pinned
version; promtool comes out of Debian's package, unpacked into the cache rather than installed. A build
that was interrupted goes on where it stopped, because Go keeps every package it has finished.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from tokenfactory.twin.gobuild import Go, find_go, run_go
from tokenfactory.twin.workshop import (
    CONTROL_PLANE,
    Say,
    ToolError,
    cache_folder,
    check_space,
    locked,
    pins,
    platform_key,
    published,
    run_quietly,
    say_on_stderr,
    tools_folder,
)

EVERY_COMPONENT = (*CONTROL_PLANE, "kubelet")
_LWS = "sigs.k8s.io/lws"

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
        for built in sorted(cache_folder().glob(f"{stem}-go*-{platform_key()}")):
            return built
        raise
    folder = cache_folder() / f"{stem}-{go.key}"
    if folder.is_dir():
        return folder
    with locked(stem, say) as lock:
        if not folder.is_dir():
            _build_control_plane(go, source, folder, lock, say)
    return folder


def _build_control_plane(go: Go, source: Path, folder: Path, lock: int, say: Say) -> None:
    version = kubernetes_version(source)
    say(
        f"building the embedded control plane (Kubernetes {version}) with {go.version} into {folder}: about "
        "6 minutes on 2 cores the first time, a minute after small changes; an interrupted build goes on"
    )
    check_space(cache_folder(), "the control plane")
    major, minor = version.removeprefix("v").split(".")[:2]
    stamp = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())
    with published(folder) as partial:
        run_go(
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
    with locked(f"lws-{digest}", say) as lock:
        if not folder.is_dir():
            say(f"building the controller of LeaderWorkerSets with {go.version}: some minutes, once")
            check_space(cache_folder(), "the controller of LeaderWorkerSets")
            with published(folder) as partial:
                build = ["build", "-ldflags", "-s -w", "-o", str(partial / "lws"), f"{_LWS}/cmd"]
                run_go(go, build, what="lws", cwd=source, env={}, lock=lock)
                listed = run_quietly([go.program, "list", "-m", "-f", "{{.Dir}}", _LWS], source)
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
    folder = cache_folder() / f"{name}-{version}-{platform_key()}"
    if (folder / name).exists():
        return folder / name
    go = find_go()
    with locked(f"{name}-{version}", say) as lock:
        if not (folder / name).exists():
            say(f"building {name} {version} with {go.version}: about {pin['minutes']} minutes, once")
            check_space(cache_folder(), name)
            with published(folder) as partial:
                run_go(
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
    program = cache_folder() / f"debian-{package}-{platform_key()}" / "usr" / "bin" / name
    if program.exists():
        return program
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ToolError(
            f"{name} is not on PATH and this is not a Debian system to take it from; "
            "install Prometheus (https://prometheus.io/download/, 2.42 or later) so that it is on PATH"
        )
    folder = program.parents[2]
    with locked(f"debian-{package}", say):
        if not program.exists():
            say(f"unpacking Debian's package {package} into {folder} for {name}: about a minute, once")
            with published(folder) as partial:
                unpack_debian(package, partial, say)
    return program


def unpack_debian(package: str, into: Path, say: Say) -> None:
    download = ["apt-get", "download", "-q", package]
    done = run_quietly(download, into)
    if done.returncode != 0 and os.geteuid() == 0:
        say("apt-get knows no such package yet: running apt-get update")
        run_quietly(["apt-get", "update", "-q"], into)
        done = run_quietly(download, into)
    archives = sorted(into.glob("*.deb"))
    if done.returncode != 0 or not archives:
        raise ToolError(
            f"`{' '.join(download)}` failed: {done.stderr.strip() or done.stdout.strip()}\n"
            f"run `apt-get update` as root and try again, or install {package} so that it is on PATH"
        )
    unpacked = run_quietly(["dpkg-deb", "-x", archives[0].name, "."], into)
    if unpacked.returncode != 0:
        raise ToolError(f"cannot unpack {archives[0].name}: {unpacked.stderr.strip()}")
    for archive in archives:
        archive.unlink()
