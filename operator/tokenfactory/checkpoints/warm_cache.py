"""WarmCache: weights, engines and compile caches of a served model, saved so that its next start is warm.

Both verbs are atomic: a copy grows under a name that nobody looks for and appears by one rename, after it was read
back and verified. An interrupted capture or restore leaves nothing that could be taken for a whole one.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Final

import msgspec

from tokenfactory.checkpoints.manifest import (
    DATA_FOLDER,
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    scan,
    verify,
)

MARKER: Final = ".tokenfactory-restored"
_PARTIAL: Final = ".partial-"
_UNFINISHED: Final = ".partial-restore"
"""Lies in a cache while a restore moves its files to their places: with it, whatever is there is half of one."""


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What a start began from. Only a marker left by a finished restore makes it warm."""

    digest: str = ""
    cold_because: str = ""
    bytes: int = 0

    @property
    def warm(self) -> bool:
        return bool(self.digest)


def capture(cache: Path, store: Path, identity: dict[str, str]) -> tuple[Path, Manifest]:
    """Save `cache` under `store` and return where it lies. The same content is saved once."""
    store.mkdir(parents=True, exist_ok=True)
    partial = store / f"{_PARTIAL}{uuid.uuid4().hex}"
    try:
        _copy(cache, partial / DATA_FOLDER)
        manifest = scan(partial / DATA_FOLDER, identity)
        final = store / manifest.digest.removeprefix("sha256:")[:32]
        if final.exists():
            try:
                verify(final, manifest.digest)
            except ManifestError:
                shutil.rmtree(final)
            else:
                return final, manifest
        (partial / MANIFEST_FILE).write_bytes(manifest.encode())
        _sync(partial)
        try:
            partial.rename(final)
        except OSError:
            # Another replica published the same content meanwhile: its copy is as good as ours.
            verify(final, manifest.digest)
        return final, manifest
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def restore(checkpoint: Path, digest: str, cache: Path, identity: dict[str, str]) -> Restored:
    """Bring a checkpoint into an empty cache, or say why the start will be cold. Never half of it.

    A cache that is not empty is that of a container which restarted in its pod: it is left as it is, unless a restore
    into it was interrupted. Then no model has seen it yet, and it is emptied and restored anew.
    """
    try:
        if (cache / _UNFINISHED).exists():
            _empty(cache)
        if (cache / MARKER).exists():
            return msgspec.json.decode((cache / MARKER).read_bytes(), type=Restored)
        collect_partials(cache)
        if any(cache.iterdir()):
            return Restored(
                cold_because="the model restarted in its pod, with the cache that it had made there"
            )
        manifest = verify(checkpoint, digest)
        _same_identity(manifest.identity, identity)
        partial = cache / f"{_PARTIAL}{uuid.uuid4().hex}"
        try:
            _copy(checkpoint / DATA_FOLDER, partial)
            if scan(partial, manifest.identity).digest != digest:
                return Restored(
                    cold_because="the copy differs from the checkpoint: the disk or the share is faulty"
                )
            restored = Restored(digest=digest, bytes=manifest.size_bytes)
            _move_in(partial, cache, restored)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (ManifestError, msgspec.MsgspecError) as error:
        return Restored(cold_because=str(error))
    except OSError as error:
        return Restored(cold_because=f"{error.strerror or error}: {error.filename or checkpoint}")
    return restored


def _move_in(whole: Path, cache: Path, restored: Restored) -> None:
    """Everything to its place in an empty cache, and then the marker; who dies on the way leaves word of it."""
    (cache / _UNFINISHED).touch()
    try:
        for path in sorted(whole.iterdir()):
            path.rename(cache / path.name)
        (cache / MARKER).write_bytes(msgspec.json.encode(restored))
    except OSError:
        _empty(cache)
        raise
    (cache / _UNFINISHED).unlink()


def _empty(cache: Path) -> None:
    """The word that it is unfinished goes last."""
    for path in sorted(cache.iterdir(), key=lambda path: path.name == _UNFINISHED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def collect_partials(store: Path) -> int:
    """Remove what interrupted captures left behind; returns how many."""
    leftovers = list(store.glob(f"{_PARTIAL}*"))
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return len(leftovers)


def _same_identity(saved: dict[str, str], wanted: dict[str, str]) -> None:
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key, "") != wanted.get(key, ""):
            raise ManifestError(
                f"it was captured for {key} {saved.get(key, '')!r}, and this is {wanted.get(key, '')!r}"
            )


def _copy(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise ManifestError(f"{source} is no folder: there is nothing to save")
    shutil.copytree(
        source,
        target,
        symlinks=True,
        ignore=shutil.ignore_patterns(MARKER, f"{_PARTIAL}*"),
        copy_function=shutil.copy2,
    )


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if path.is_symlink():
                continue
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
