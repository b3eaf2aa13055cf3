"""A model's container on the real node: says what its GPUs may draw at its start, then serves as a NIM 1.x does."""

import json
import os
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pynvml

TOKENS_PER_SECOND = 100
BEGAN = time.monotonic()


def limits() -> dict[str, int]:
    """Enforced, in milliwatts, by UUID."""
    pynvml.nvmlInit()
    uuids = os.environ["NVIDIA_VISIBLE_DEVICES"].split(",")
    handles = {uuid: pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
    return {uuid: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) for uuid, handle in handles.items()}


class Handler(BaseHTTPRequestHandler):
    """Health and metrics."""

    def do_GET(self) -> None:
        tokens = int((time.monotonic() - BEGAN) * TOKENS_PER_SECOND)
        lines = ("# TYPE generation_tokens_total counter", f"generation_tokens_total {tokens}", "")
        body = "\n".join(lines).encode() if "metrics" in self.path else b"ok\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The log holds the limits, and nothing else."""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(json.dumps(limits()), flush=True)  # noqa: T201
    ThreadingHTTPServer(("", 8000), Handler).serve_forever()
