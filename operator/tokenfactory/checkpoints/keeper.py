"""The pod's side of a WarmCache: save the cache once the model serves, tell the operator, keep the last few.

It runs beside the model with no access to the API server. The operator asks it over HTTP what it has saved and
records that as a Checkpoint; only a digest that stands in such an object is ever restored.
"""

from __future__ import annotations

import http.server
import logging
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import msgspec

from tokenfactory.checkpoints import warm_cache
from tokenfactory.checkpoints.manifest import ManifestError

log = logging.getLogger(__name__)


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator is told."""

    path: str
    digest: str
    size_bytes: int
    identity: dict[str, str]


class Keeper:
    """One loop: wait until the model serves, save, wait for the next time."""

    def __init__(
        self, *, cache: Path, store: Path, identity: dict[str, str], keep: int, serving: Callable[[], bool]
    ) -> None:
        self._cache = cache
        self._root = store
        self._store = store / identity.get("factory", "unknown") / identity.get("model", "unknown")
        self._identity = identity
        self._keep = keep
        self._serving = serving
        self._stop = threading.Event()
        self.saved: Saved | None = None
        self.problem = "the model does not serve yet"

    def run(self, every_seconds: float, poll_seconds: float = 1.0) -> None:
        while not self._stop.is_set():
            done = self._serving() and self.capture()
            self._stop.wait(every_seconds if done else poll_seconds)

    def stop(self) -> None:
        self._stop.set()

    def capture(self) -> bool:
        try:
            where, manifest = warm_cache.capture(self._cache, self._store, self._identity)
        except (ManifestError, OSError) as error:
            self.problem = str(error)
            log.warning("checkpoint not captured", extra={"reason": str(error)})
            return False
        self.saved = Saved(
            path=str(where.relative_to(self._root)),
            digest=manifest.digest,
            size_bytes=manifest.size_bytes,
            identity=self._identity,
        )
        self.problem = ""
        self._collect(where)
        return True

    def _collect(self, newest: Path) -> None:
        """Keep the newest few; the one just verified never goes."""
        found = [path for path in self._store.iterdir() if path.is_dir() and not path.name.startswith(".")]
        oldest_first = sorted(found, key=lambda path: (path == newest, path.stat().st_mtime_ns))
        for folder in oldest_first[: max(0, len(oldest_first) - self._keep)]:
            shutil.rmtree(folder, ignore_errors=True)


def http_server(keeper: Keeper, address: tuple[str, int]) -> http.server.ThreadingHTTPServer:
    """GET /checkpoint: what was saved last, or 503 and why nothing was."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            saved = keeper.saved
            body = msgspec.json.encode(saved) if saved else keeper.problem.encode()
            self.send_response(200 if saved else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Health checks are no events."""

    return http.server.ThreadingHTTPServer(address, Handler)


def serving(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - a fixed http URL of this pod
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
