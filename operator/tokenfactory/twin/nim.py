"""A model server that behaves like a NIM image as far as this product can see: health, metrics, tokens, watts.

It loads (slowly when its cache is cold, and then fills the cache), serves, and counts tokens at a rate that follows
the true enforced limit of its GPUs along a flat-then-cliff curve. It can also be as bad as the real thing: late,
wrong, gone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from tokenfactory.checkpoints.warm_cache import MARKER

_TTFT_BOUNDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ITL_BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25)


def flat_then_cliff(watts: float, *, knee: float, floor: float, full: float) -> float:
    """Tokens per second of one GPU: flat above the knee, falling steeply below it."""
    if watts >= knee:
        return full
    if watts <= floor:
        return 0.1 * full
    return full * (0.1 + 0.9 * (watts - floor) / (knee - floor))


class SimulatedNim:
    """One replica. `enforced_watts` reads the truth of its GPUs; `set_load` makes them draw."""

    def __init__(
        self,
        *,
        model: str,
        cache: Path,
        enforced_watts: Callable[[], list[float]],
        set_load: Callable[[float], None],
        cold_seconds: float = 3.0,
        warm_seconds: float = 0.5,
        tokens_per_second_per_gpu: float = 800.0,
        knee_watts: float = 450.0,
    ) -> None:
        self._model = model
        self._cache = cache
        self._enforced_watts = enforced_watts
        self._set_load = set_load
        self._load_seconds = {True: warm_seconds, False: cold_seconds}
        self._full = tokens_per_second_per_gpu
        self._knee = knee_watts
        self._tokens = 0.0
        self._counted_at = time.monotonic()
        self._runner: web.AppRunner | None = None
        self.ready = False
        self.warm = False
        self.demand = 1.0
        """Offered traffic as a share of what it serves at full power."""

    async def start(self, address: str, port: int) -> None:
        """Listen first, load then: a real image answers `live` long before `ready`."""
        app = web.Application()
        app.router.add_get("/v1/health/live", self._live)
        app.router.add_get("/v1/health/ready", self._is_ready)
        app.router.add_get("/v1/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, address, port).start()
        self.warm = (self._cache / MARKER).exists()
        await asyncio.sleep(self._load_seconds[self.warm])
        if not self.warm:
            await asyncio.to_thread(self._download)
        self._counted_at = time.monotonic()
        self._set_load(self.demand)
        self.ready = True

    async def stop(self) -> None:
        self.ready = False
        self._set_load(0.0)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def tokens_per_second(self) -> float:
        if not self.ready:
            return 0.0
        floor = 0.45 * self._knee
        rates = [
            flat_then_cliff(watts, knee=self._knee, floor=floor, full=self._full)
            for watts in self._enforced_watts()
        ]
        # Tensor parallel: all GPUs of a replica wait for the slowest.
        return min(rates, default=0.0) * len(rates) * min(1.0, self.demand)

    def _download(self) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        (self._cache / "weights.bin").write_bytes(os.urandom(1 << 20))
        (self._cache / "engine.plan").write_text(f"engine of {self._model}\n")

    def _count(self) -> float:
        now = time.monotonic()
        self._tokens += self.tokens_per_second() * (now - self._counted_at)
        self._counted_at = now
        return self._tokens

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"message": "live"})

    async def _is_ready(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"message": "ready" if self.ready else "loading"}, status=200 if self.ready else 503
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        if not self.ready:
            return web.Response(status=503)
        tokens = self._count()
        rate = self.tokens_per_second()
        requests = tokens / 200
        latency = 32.0 / rate if rate else 1.0
        lines = [
            "# TYPE generation_tokens_total counter",
            f"generation_tokens_total {tokens:.0f}",
            "# TYPE prompt_tokens_total counter",
            f"prompt_tokens_total {tokens * 4:.0f}",
            "# TYPE num_requests_running gauge",
            f"num_requests_running {min(32, round(32 * self.demand))}",
            "# TYPE num_requests_waiting gauge",
            f"num_requests_waiting {max(0, round(32 * (self.demand - 1)))}",
            "# TYPE gpu_cache_usage_perc gauge",
            f"gpu_cache_usage_perc {min(1.0, 0.6 * self.demand):.3f}",
            *_histogram("time_to_first_token_seconds", _TTFT_BOUNDS, 0.2, requests),
            *_histogram("time_per_output_token_seconds", _ITL_BOUNDS, latency, tokens),
        ]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


def _histogram(name: str, bounds: tuple[float, ...], value: float, count: float) -> list[str]:
    """Every sample had the same value: enough for a quantile, and easy to check."""
    buckets = [f'{name}_bucket{{le="{bound}"}} {count if value <= bound else 0:.0f}' for bound in bounds]
    return [
        f"# TYPE {name} histogram",
        *buckets,
        f'{name}_bucket{{le="+Inf"}} {count:.0f}',
        f"{name}_sum {value * count:.3f}",
        f"{name}_count {count:.0f}",
    ]
