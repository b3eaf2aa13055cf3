"""A saved model cache comes back byte for byte with its times, or the start is honestly cold."""

import contextlib
import os
from pathlib import Path

import pytest

from tokenfactory.checkpoints import warm_cache
from tokenfactory.checkpoints.manifest import DATA_FOLDER, ManifestError, verify

IDENTITY = {"model": "llama-70b", "gpuProduct": "NVIDIA H100 80GB HBM3", "tensorParallel": "4"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "engines").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(os.urandom(100_000))
    (folder / "engines" / "tp4.plan").write_bytes(b"engine")
    (folder / "current").symlink_to("engines/tp4.plan")
    os.utime(folder / "engines" / "tp4.plan", ns=(1, 1_700_000_000_123_456_789))
    return folder


def test_a_restored_cache_has_the_same_bytes_links_and_times(cache: Path, tmp_path: Path):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    new = tmp_path / "new"
    new.mkdir()
    restored = warm_cache.restore(where, manifest.digest, new, IDENTITY)
    assert restored.warm
    assert (new / "weights.bin").read_bytes() == (cache / "weights.bin").read_bytes()
    assert (new / "current").readlink() == Path("engines/tp4.plan")
    assert (new / "engines" / "tp4.plan").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (new / warm_cache.MARKER).exists()


def test_the_same_content_is_saved_once(cache: Path, tmp_path: Path):
    first, _ = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    second, _ = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    assert first == second
    assert [path.name for path in (tmp_path / "store").iterdir()] == [first.name]


@pytest.mark.parametrize("damage", ["flip a byte", "drop a file", "add a file", "cut the manifest"])
def test_a_damaged_checkpoint_gives_a_cold_start_and_an_untouched_cache(
    cache: Path, tmp_path: Path, damage: str
):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    weights = where / DATA_FOLDER / "weights.bin"
    match damage:
        case "flip a byte":
            content = bytearray(weights.read_bytes())
            content[50_000] ^= 1
            weights.write_bytes(content)
        case "drop a file":
            weights.unlink()
        case "add a file":
            (where / DATA_FOLDER / "extra").write_bytes(b"x")
        case "cut the manifest":
            (where / "manifest.json").write_bytes(b'{"identity": {')
    new = tmp_path / "new"
    new.mkdir()
    restored = warm_cache.restore(where, manifest.digest, new, IDENTITY)
    assert not restored.warm
    assert restored.cold_because
    assert list(new.iterdir()) == []


def test_a_damaged_checkpoint_is_replaced_by_the_next_capture(cache: Path, tmp_path: Path):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    (where / DATA_FOLDER / "weights.bin").write_bytes(b"rot")
    again, _ = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    assert verify(again, manifest.digest) == manifest


def test_another_gpu_product_is_refused_by_name(cache: Path, tmp_path: Path):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    new = tmp_path / "new"
    new.mkdir()
    restored = warm_cache.restore(where, manifest.digest, new, IDENTITY | {"gpuProduct": "NVIDIA B200"})
    assert "gpuProduct" in restored.cold_because
    assert "NVIDIA B200" in restored.cold_because


def test_a_link_out_of_the_cache_is_refused(cache: Path, tmp_path: Path):
    (cache / "escape").symlink_to("/etc/passwd")
    with pytest.raises(ManifestError, match="outside the cache"):
        warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    assert list((tmp_path / "store").iterdir()) == []


def test_what_an_interrupted_capture_left_is_collected(cache: Path, tmp_path: Path):
    store = tmp_path / "store"
    where, _ = warm_cache.capture(cache, store, IDENTITY)
    (store / ".partial-abc" / "data").mkdir(parents=True)
    assert warm_cache.collect_partials(store) == 1
    assert [path.name for path in store.iterdir()] == [where.name]


def test_a_container_that_restarts_in_its_pod_finds_the_cache_as_it_left_it(cache: Path, tmp_path: Path):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    new = tmp_path / "new"
    new.mkdir()
    first = warm_cache.restore(where, manifest.digest, new, IDENTITY)
    (new / "compiled-since").write_bytes(b"x")
    (where / DATA_FOLDER / "weights.bin").write_bytes(b"rot")  # it is not even looked at again
    assert warm_cache.restore(where, manifest.digest, new, IDENTITY) == first
    assert first.warm
    assert (new / "compiled-since").exists()


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("end", [SystemExit("killed"), OSError(5, "I/O error")])
def test_half_a_restore_is_never_taken_for_a_cache(cache: Path, tmp_path: Path, monkeypatch, after, end):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    tops = sorted(path.name for path in (where / DATA_FOLDER).iterdir())
    assert len(tops) == 3
    new = tmp_path / "new"
    new.mkdir()
    (new / ".partial-old").mkdir()  # of a restore that died while it was copying
    rename, moved = Path.rename, []

    def dies(path: Path, target: Path) -> Path:
        if len(moved) == after:
            raise end
        moved.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        patched.setattr(Path, "rename", dies)
        if after == len(tops):
            patched.setattr(Path, "write_bytes", lambda *_: dies(new, new))
        assert not warm_cache.restore(where, manifest.digest, new, IDENTITY).warm
        assert list(new.iterdir()) == [], "nothing of it is left to a cold start"
    assert warm_cache.restore(where, manifest.digest, new, IDENTITY).warm
    assert sorted(path.name for path in new.iterdir()) == sorted([*tops, warm_cache.MARKER])


def test_a_cache_that_a_cold_start_has_made_is_not_restored_over(cache: Path, tmp_path: Path):
    where, manifest = warm_cache.capture(cache, tmp_path / "store", IDENTITY)
    made = tmp_path / "made"
    made.mkdir()
    (made / "weights.bin").write_bytes(b"downloaded")
    again = warm_cache.restore(where, manifest.digest, made, IDENTITY)
    assert not again.warm
    assert "restarted in its pod" in again.cold_because
    assert [path.name for path in made.iterdir()] == ["weights.bin"]
