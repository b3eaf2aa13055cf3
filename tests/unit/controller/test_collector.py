"""What pods tell of their caches is recorded once, and completely, whoever died while doing so."""

from types import SimpleNamespace

import msgspec
import pytest

from tokenfactory.api.checkpoint import Checkpoint, CheckpointStatus
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.checkpoints.keeper import Saved
from tokenfactory.controller.collector import CheckpointCollector
from tokenfactory.kube.apply import Written
from tokenfactory.kube.objects import Pod

DIGEST = "sha256:" + "ab" * 32
KEY = ("inference", f"chat-llama-{'ab' * 8}")
FACTORY = msgspec.convert(
    {
        "metadata": {"name": "chat", "namespace": "inference", "uid": "u"},
        "spec": {
            "power": {"domain": "hall"},
            "models": [
                {
                    "name": "llama",
                    "nim": {"image": "nvcr.io/nim/meta/llama:1.8.0"},
                    "checkpoint": {"claim": "cache"},
                }
            ],
        },
    },
    TokenFactory,
)


class Writer:
    def __init__(self, held):
        self._held, self.applied, self.told = held, [], []

    async def apply(self, _kind, key, content, *, owners):
        self.applied.append(key)
        made = {
            "metadata": {"name": key[1], "namespace": key[0]},
            "spec": msgspec.to_builtins(content["spec"]),
        }
        self._held[key] = msgspec.convert(made, Checkpoint)
        return Written(self._held[key])

    async def status(self, held, status):
        self.told.append(status.phase)
        self._held[KEY] = msgspec.structs.replace(held, status=status)
        return Written(self._held[KEY])


@pytest.mark.parametrize("died", [False, True], ids=["nobody dies", "an operator dies before it says Ready"])
async def test_a_cache_is_recorded_once_and_said_to_be_ready(died: bool):
    held = {}
    stores = {Checkpoint: SimpleNamespace(snapshot=lambda: held)}
    writer = Writer(held)
    collector = CheckpointCollector(SimpleNamespace(stores=stores, gpu_nodes={}), writer)
    saved = Saved(digest=DIGEST, size_bytes=1, path="/p", identity={"image": "llama"})
    (model,) = FACTORY.spec.models

    async def record() -> None:
        assert await collector._record(
            saved, msgspec.convert({"metadata": {"name": "p"}}, Pod), FACTORY, model
        )

    await record()
    if died:
        held[KEY] = msgspec.structs.replace(held[KEY], status=CheckpointStatus())
        await record()
    await record()
    assert writer.applied == [KEY]
    assert writer.told == ["Ready"] * (2 if died else 1)
    assert held[KEY].status.phase == "Ready"
