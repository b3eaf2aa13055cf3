"""The images of the node tests, made without a registry or a builder: this interpreter, our wheel, what it needs.

Ours, a model's that stands on it (model.py), and the `pause` that holds a pod's network. An image is a tar archive in OCI layout that `ctr images import` reads. Three layers: the interpreter with the shared
libraries that it and the wheels load, the packages that the wheel depends on, the wheel. The first two are kept in
the cache under a hash of what they are made from; only the third is made anew when the product changes. Nine
seconds the first time, one after a change.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from packaging.markers import default_environment
from packaging.requirements import Requirement

from tokenfactory.twin import workshop

REPOSITORY = Path(__file__).parents[2]
IMAGE = "tokenfactory.dev/tokenfactory:test"
MODEL = "tokenfactory.dev/model:test"
PAUSE = "tokenfactory.dev/pause:test"
ENTRYPOINTS = {IMAGE: ["tokenfactory"], MODEL: ["python3", "/model.py"], PAUSE: ["/pause"]}
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"usr/local/lib/{VERSION}/site-packages"
UNUSED = {"__pycache__", "site-packages", "test", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo"}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_MODEL = Path(__file__).parent / "model.py"
_PAUSE = """
#include <signal.h>
#include <unistd.h>
static void end(int number) { (void)number; _exit(0); }
int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }
"""
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnonroot:x:65532:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "usr/local/bin/tokenfactory": f"#!/usr/local/bin/{VERSION}\nfrom tokenfactory.cli.main import main\nmain()\n",
}


class Images:
    """The three images as layers in the cache; `write` makes the archive of them."""

    def __init__(self, say: workshop.Say = workshop.say_on_stderr) -> None:
        maker = _text(Path(__file__))
        product = [
            _layer(f"python-{_key(sys.version, platform.libc_ver(), maker)}", _interpreter, say),
            _layer(f"packages-{_key(sys.version, *_dependencies(), maker)}", _packages, say),
            _layer(f"wheel-{_key(*_sources(), maker)}", _wheel, say),
        ]
        model = _layer(
            f"model-{_key(_text(_MODEL))}", lambda out: out.add(_MODEL, "model.py", filter=_plain), say
        )
        pause = _layer(f"pause-{_key(_PAUSE)}", _pause, say)
        self.layers = {IMAGE: product, MODEL: [*product, model], PAUSE: [pause]}
        _keep_newest(_folder())

    def write(self, to: IO[bytes]) -> None:
        with tarfile.open(fileobj=to, mode="w|", format=tarfile.PAX_FORMAT) as out:
            _layout(out, self.layers)


# --- layers


def _interpreter(out: tarfile.TarFile) -> None:
    home = Path(sysconfig.get_path("stdlib"))
    program = Path(sys.base_prefix) / "bin" / VERSION
    program = program if program.exists() else Path(os.path.realpath(sys.executable))
    out.add(program.resolve(), f"usr/local/bin/{VERSION}", filter=_plain)
    for name in ("python3", "python"):
        _link(out, f"usr/local/bin/{name}", VERSION)
    for folder, target in (("lib", "usr/lib"), ("lib64", "usr/lib"), ("usr/lib64", "lib")):
        _link(out, folder, target)
    for path in sorted(home.iterdir()):
        if path.name not in UNUSED and not path.name.startswith("config-"):
            out.add(path, f"usr/local/lib/{VERSION}/{path.name}", filter=_plain)
    out.add(home / "__pycache__", f"usr/local/lib/{VERSION}/__pycache__", filter=_plain)
    extensions = (path for root in (home / "lib-dynload", *_package_roots()) for path in root.rglob("*.so*"))
    for library in _libraries([program.resolve(), *extensions]):
        out.add(library.resolve(), f"usr/lib/{library.name}", filter=_plain)
    for name, text in _FILES.items():
        _write(out, name, text.encode(), 0o755 if "/bin/" in name else 0o644)
    for name in ("tmp", "root", "home/nonroot"):
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
        out.addfile(entry)


def _libraries(programs: list[Path]) -> list[Path]:
    """What the loader would map for these, besides what wheels carry themselves."""
    told = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    found = set(re.findall(r"(?:=> |^\s)(/\S+) \(0x", told, re.MULTILINE))
    return sorted(path for path in map(Path, found) if "site-packages" not in path.parts)


def _packages(out: tarfile.TarFile) -> None:
    for distribution in _distributions():
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and path.is_file():
                out.add(path, f"{SITE}/{file}", filter=_plain)


def _wheel(out: tarfile.TarFile) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", scratch],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
        )
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked)
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", str(unpacked)],
            check=True,
        )
        out.add(unpacked, SITE, filter=_plain)


def _pause(out: tarfile.TarFile) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch) / "pause.c", Path(scratch) / "pause"
        source.write_text(_PAUSE)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-static", "-Os", "-s", "-o", program, source], check=True)
        out.add(program, "pause", filter=_plain)


def _distributions() -> list[importlib.metadata.Distribution]:
    """What our wheel needs at run time, and what that needs."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [Requirement(text) for text in _declared()]
    while wanted:
        requirement = wanted.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(requirement.name)
        environment = {**default_environment(), "extra": ""}
        for text in found[name].requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate(environment):
                wanted.append(needed)
    return [found[name] for name in sorted(found)]


def _declared() -> list[str]:
    import tomllib

    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]


def _dependencies() -> list[str]:
    return [f"{it.metadata['Name']}=={it.version}" for it in _distributions()]


def _package_roots() -> Iterator[Path]:
    for distribution in _distributions():
        for name in {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}:
            root = Path(str(distribution.locate_file(name)))
            if root.is_dir() and name != "..":
                yield root


def _sources() -> Iterator[str]:
    for root in ("operator/tokenfactory", "tests/agent/nvml", "pyproject.toml"):
        at = REPOSITORY / root
        for path in [at] if at.is_file() else sorted(at.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{path.relative_to(REPOSITORY)} {hashlib.sha256(path.read_bytes()).hexdigest()}"


# --- archives


def _layout(out: tarfile.TarFile, contents: dict[str, list[Path]]) -> None:
    """An OCI image layout; layers are not compressed: they never travel."""
    index = []
    digests: dict[Path, str] = {}
    for name, layers in contents.items():
        described = []
        for layer in layers:
            known = layer in digests
            digest = digests.setdefault(layer, digests.get(layer) or _digest_of(layer))
            described.append(
                _descriptor("application/vnd.oci.image.layer.v1.tar", digest, layer.stat().st_size)
            )
            if not known:
                out.add(layer, f"blobs/sha256/{digest}")
        config = {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {
                "Entrypoint": ENTRYPOINTS[name],
                "Env": ["PATH=/usr/local/bin:/usr/bin", "HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1"],
            },
            "rootfs": {"type": "layers", "diff_ids": [it["digest"] for it in described]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _blob(out, "application/vnd.oci.image.config.v1+json", config),
            "layers": described,
        }
        index.append(
            {**_blob(out, manifest["mediaType"], manifest), "annotations": {"io.containerd.image.name": name}}
        )
    _write(out, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
    _write(out, "index.json", json.dumps({"schemaVersion": 2, "manifests": index}).encode())


def _blob(out: tarfile.TarFile, kind: str, content: object) -> dict[str, object]:
    data = json.dumps(content, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    _write(out, f"blobs/sha256/{digest}", data)
    return _descriptor(kind, digest, len(data))


def _descriptor(kind: str, digest: str, size: int) -> dict[str, object]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _layer(name: str, fill: Callable[[tarfile.TarFile], None], say: workshop.Say) -> Path:
    path = _folder() / f"{name}.tar"
    with workshop.locked("node-image", say):
        if not path.exists():
            say(f"making the image layer {path}: some seconds, once per version")
            _publish(path, fill)
        os.utime(path)  # in use: not the next one to go
    return path


def _publish(path: Path, fill: Callable[[tarfile.TarFile], None]) -> None:
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as out:
        fill(out)
    partial.replace(path)


def _keep_newest(folder: Path, count: int = 12) -> None:
    """The cache does not grow with every change of a source file."""
    for old in sorted(folder.glob("*.tar"), key=lambda it: it.stat().st_mtime)[:-count]:
        old.unlink(missing_ok=True)


def _folder() -> Path:
    folder = workshop.cache_folder() / "node-image"
    folder.mkdir(exist_ok=True)
    return folder


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Root's, whoever has built it. Times stay: compiled Python goes by them."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _write(out: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    out.addfile(entry, io.BytesIO(data))


def _link(out: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    out.addfile(entry)


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def _text(path: Path) -> str:
    return path.read_text()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
