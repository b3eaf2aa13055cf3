"""What a saved model cache consists of: every file with its digest, size and mtime, under one digest of the whole.

mtimes belong to the state: engines and compile caches are rebuilt when a file looks newer than it was, and that
costs most of what the checkpoint was to save. Links that leave the folder and special files are refused: a
checkpoint must mean the same wherever it is restored.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

import msgspec

MANIFEST_FILE: Final = "manifest.json"
DATA_FOLDER: Final = "data"
_CHUNK: Final = 1 << 20


class ManifestError(Exception):
    """The folder is no checkpoint, or not the one that was asked for; the message says which file and why."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    size: int
    mtime_ns: int
    mode: int
    sha256: str = ""
    link: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    identity: dict[str, str]
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    def encode(self) -> bytes:
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.encode()).hexdigest()


def scan(folder: Path, identity: dict[str, str]) -> Manifest:
    """The manifest of what lies in `folder` now."""
    entries = [_entry(folder, path) for path in _walk(folder)]
    return Manifest(identity=identity, files=tuple(sorted(entries, key=lambda entry: entry.path)))


def load(checkpoint: Path) -> Manifest:
    try:
        return msgspec.json.decode((checkpoint / MANIFEST_FILE).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise ManifestError(f"{checkpoint} holds no {MANIFEST_FILE}: it is no complete checkpoint") from None
    except msgspec.DecodeError as error:
        raise ManifestError(f"{checkpoint / MANIFEST_FILE} cannot be read: {error}") from None


def verify(checkpoint: Path, digest: str) -> Manifest:
    """The manifest, after every byte below was compared with it and it with `digest`."""
    manifest = load(checkpoint)
    if manifest.digest != digest:
        raise ManifestError(f"{checkpoint} is {manifest.digest}, not the {digest} that was recorded for it")
    data = checkpoint / DATA_FOLDER
    present = {str(path.relative_to(data)) for path in _walk(data)}
    listed = {entry.path for entry in manifest.files}
    if present != listed:
        odd = min(present ^ listed)
        raise ManifestError(f"{odd} is {'missing' if odd in listed else 'not in the manifest'}")
    for wanted in manifest.files:
        found = _entry(data, data / wanted.path)
        if found.sha256 != wanted.sha256 or found.link != wanted.link:
            raise ManifestError(f"{wanted.path} has changed since it was captured")
    return manifest


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, files in os.walk(folder, followlinks=False):
        found += [Path(root, name) for name in files]
        found += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
    return found


def _entry(folder: Path, path: Path) -> FileEntry:
    info = path.lstat()
    name = str(path.relative_to(folder))
    if stat.S_ISLNK(info.st_mode):
        target = str(path.readlink())
        inside = os.path.normpath(Path(name).parent / target)
        if Path(target).is_absolute() or inside.startswith(".."):
            raise ManifestError(
                f"{name} links to {target}, outside the cache: copy what it needs into the cache"
            )
        return FileEntry(path=name, size=0, mtime_ns=0, mode=0o777, link=target)
    if not stat.S_ISREG(info.st_mode):
        raise ManifestError(f"{name} is neither a file nor a link: a checkpoint cannot hold it")
    return FileEntry(
        path=name,
        size=info.st_size,
        mtime_ns=info.st_mtime_ns,
        mode=stat.S_IMODE(info.st_mode),
        sha256=_sha256(path),
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
