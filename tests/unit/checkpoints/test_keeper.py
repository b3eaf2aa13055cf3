"""The pod's side: save once the model serves, tell the operator, restore only what was recorded."""

import threading
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from tokenfactory.checkpoints.keeper import Keeper, Saved, http_server
from tokenfactory.checkpoints.warm_cache import MARKER, Restored
from tokenfactory.cli.main import app

IDENTITY = {"factory": "inference/chat", "model": "llama"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    return folder


def keeper(cache: Path, store: Path, *, serving: bool = True, keep: int = 3) -> Keeper:
    return Keeper(cache=cache, store=store, identity=IDENTITY, keep=keep, serving=lambda: serving)


def saved_folders(store: Path) -> list[Path]:
    return [path for path in (store / "inference/chat/llama").iterdir() if path.is_dir()]


def test_it_keeps_the_newest_few_and_always_the_last_good_one(cache: Path, tmp_path: Path):
    one = keeper(cache, tmp_path / "store", keep=2)
    for number in range(4):
        (cache / "weights.bin").write_bytes(b"%d" % number)
        assert one.capture()
    assert len(saved_folders(tmp_path / "store")) == 2
    assert one.saved is not None
    assert (tmp_path / "store" / one.saved.path).is_dir()


def test_the_operator_is_told_what_was_saved_or_why_nothing_was(cache: Path, tmp_path: Path):
    one = keeper(cache, tmp_path / "store")
    server = http_server(one, ("127.0.0.1", 0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/checkpoint"
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=5)
        assert refused.value.code == 503
        assert b"does not serve yet" in refused.value.read()
        one.capture()
        with urllib.request.urlopen(url, timeout=5) as answer:
            told = msgspec.json.decode(answer.read(), type=Saved)
        assert told == one.saved
    finally:
        server.shutdown()
        server.server_close()


def test_a_cache_that_cannot_be_read_is_a_reason_not_a_crash(tmp_path: Path):
    one = keeper(tmp_path / "missing", tmp_path / "store")
    assert not one.capture()
    assert "nothing to save" in one.problem


def restore(cache: Path, store: Path, restore_from: str, log: Path) -> Restored:
    arguments = ["checkpoint", "restore", f"--cache={cache}", f"--store={store}", f"--termination-log={log}"]
    arguments += [f"--identity={key}={value}" for key, value in IDENTITY.items()]
    result = CliRunner().invoke(app, [*arguments, f"--restore-from={restore_from}"])
    assert result.exit_code == 0, result.output
    return msgspec.json.decode(log.read_bytes(), type=Restored)


def test_a_new_pod_restores_what_the_operator_recorded_and_says_so(cache: Path, tmp_path: Path):
    one = keeper(cache, tmp_path / "store")
    one.capture()
    assert one.saved is not None
    where = f"{one.saved.path}@{one.saved.digest}"
    told = restore(tmp_path / "new", tmp_path / "store", where, tmp_path / "log")
    assert told.digest == one.saved.digest
    assert (tmp_path / "new" / MARKER).exists()


@pytest.mark.parametrize(
    ("restore_from", "words"),
    [
        ("", "no checkpoint was recorded"),
        ("../../etc@sha256:" + "0" * 64, "outside the checkpoint volume"),
        ("inference/chat/llama/none@sha256:" + "0" * 64, "no complete checkpoint"),
    ],
)
def test_anything_else_is_a_cold_start_that_says_why(
    cache: Path, tmp_path: Path, restore_from: str, words: str
):
    keeper(cache, tmp_path / "store").capture()
    told = restore(tmp_path / "new", tmp_path / "store", restore_from, tmp_path / "log")
    assert not told.warm
    assert words in told.cold_because
    assert not (tmp_path / "new" / MARKER).exists()
