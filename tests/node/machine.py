"""What a real node needs of this machine: said before anything is started, and fetched without being installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenfactory.twin import toolchain, workshop

PACKAGES = ("containerd", "runc", "containernetworking-plugins")
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "runc")
NEEDED = ("cc", "ip", "ldd", "mount", "nsenter", "setpriv", "unshare")
HIDDEN = ("/var/lib", "/var/log", "/run")
NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
_TRIAL = """
set -e
ip link add v0 type veth peer name v1
ip link add b0 type bridge
mkdir "$0/lower" "$0/upper" "$0/work" "$0/merged"
mount -t overlay overlay -o "lowerdir=$0/lower,upperdir=$0/upper,workdir=$0/work" "$0/merged"
"""


@dataclass(frozen=True)
class Runtime:
    """containerd and its helpers, and the network plugins' folder."""

    path: str
    plugins: Path


def lacks() -> str | None:
    """Which programs somebody could install, and has not; None where all are there."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if not missing:
        return None
    return (
        f"a real node needs {', '.join(missing)} on PATH (Debian: util-linux, mount, iproute2, gcc, libc-bin)"
    )


def why_not(scratch: Path, *paths: Path) -> str | None:
    """Why this machine cannot be a real node that sees `paths`, whatever is installed; None where it can."""
    if not sys.platform.startswith("linux"):
        return "a real node needs Linux"
    if os.geteuid() != 0:
        return "a real node needs root: containerd and the kubelet make namespaces, mounts and cgroups"
    hidden = [path for path in paths if any(path.is_relative_to(it) for it in HIDDEN)]
    if hidden:
        return (
            f"a real node has a {', '.join(HIDDEN)} of its own, and {hidden[0]} is there: it could not see it"
        )
    if not cgroup_folders():
        return "a real node needs cgroups mounted under /sys/fs/cgroup that can be written"
    if lacks():
        return None  # nothing to try it with, which is said by itself
    tried = subprocess.run(
        [*NAMESPACES, "sh", "-c", _TRIAL, str(scratch)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if tried.returncode != 0:
        return f"a real node needs namespaces, veth, bridge and overlayfs, here: {tried.stderr.strip()}"
    return None


def cgroup_folders() -> tuple[Path, ...]:
    """Where our cgroup is: in one place, or once per controller under cgroup v1."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        folders = [top]
    else:
        kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
        folders = [
            Path(at) for at, kind in kinds.items() if kind.startswith("cgroup") and Path(at).parent == top
        ]
    return tuple(folder for folder in folders if os.access(folder, os.W_OK))


def runtime(say: workshop.Say = workshop.say_on_stderr) -> Runtime:
    """Debian's packages, unpacked into the cache; on another system what is on PATH. ToolError: there is none."""
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        return _unpacked(say)
    plugins = next(
        (it for it in map(Path, ("/opt/cni/bin", "/usr/lib/cni")) if (it / "bridge").exists()), None
    )
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or plugins is None:
        raise workshop.ToolError(
            f"no Debian to take them from, and not here: {', '.join(missing) or 'the CNI plugins in /opt/cni/bin'}"
        )
    return Runtime(os.environ["PATH"], plugins)


def _unpacked(say: workshop.Say) -> Runtime:
    folder = workshop.cache_folder() / f"debian-node-runtime-{workshop.platform_key()}"
    with workshop.locked(folder.name, say):
        if not folder.exists():
            say(f"unpacking Debian's {', '.join(PACKAGES)} into {folder}: some seconds, once")
            with workshop.published(folder) as partial:
                for package in PACKAGES:
                    toolchain.unpack_debian(package, partial, say)
    path = ":".join((str(folder / "usr/bin"), str(folder / "usr/sbin"), os.environ["PATH"]))
    return Runtime(path, folder / "usr/lib/cni")
