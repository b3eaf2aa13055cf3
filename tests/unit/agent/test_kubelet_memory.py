"""After a restart of the kubelet: what it does not list yet, and what it will never list again."""

import pytest

from tokenfactory.agent.kubelet_memory import SETTLE_SECONDS, KubeletMemory
from tokenfactory.agent.parts import PodDevices

CHAT = PodDevices("inference", "chat", ("gpu-0", "gpu-1"))
OTHER = PodDevices("inference", "other", ("gpu-2",))


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def socket(tmp_path):
    path = tmp_path / "kubelet.sock"
    path.write_text("")
    return path


@pytest.fixture
def memory(socket, clock):
    return KubeletMemory(socket, lambda: clock[0])


def restart(socket):
    fresh = socket.with_name("fresh")
    fresh.write_text("")
    fresh.replace(socket)


def test_while_the_kubelet_runs_it_is_believed_at_once(memory):
    assert memory.complete((CHAT, OTHER)) == (CHAT, OTHER)
    assert memory.complete((OTHER,)) == (OTHER,)
    assert memory.complete(()) == ()


def test_a_kubelet_that_has_just_started_takes_no_gpu_from_a_pod(memory, socket, clock):
    memory.complete((CHAT, OTHER))
    restart(socket)
    assert memory.complete(()) == (CHAT, OTHER)
    clock[0] += 1
    assert set(memory.complete((OTHER,))) == {CHAT, OTHER}
    assert set(memory.complete((OTHER, CHAT))) == {CHAT, OTHER}


def test_a_pod_that_ended_meanwhile_is_believed_gone_in_the_end(memory, socket, clock):
    memory.complete((CHAT,))
    restart(socket)
    assert memory.complete(()) == (CHAT,)
    clock[0] += SETTLE_SECONDS
    assert memory.complete(()) == ()


def test_a_gpu_that_is_another_pods_by_now_is_not_kept(memory, socket):
    memory.complete((CHAT,))
    restart(socket)
    taken = PodDevices("inference", "new", ("gpu-1",))
    assert memory.complete((taken,)) == (taken, PodDevices("inference", "chat", ("gpu-0",)))


def test_a_kubelet_that_goes_between_answer_and_look_counts_as_restarted(memory, socket):
    memory.complete((CHAT,))
    socket.unlink()
    assert memory.complete(()) == (CHAT,)
