"""Two sites on one machine share no address, and a process of the twin ends with whoever started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.waiting import wait_for

from tokenfactory.twin.addresses import LoopbackBlock
from tokenfactory.twin.processes import PROGRAM, environment


def test_two_sites_share_no_address_and_a_released_block_can_be_had_again():
    one, other = LoopbackBlock.acquire(), LoopbackBlock.acquire()
    assert one.number != other.number
    addresses = [one.node(0), one.node(300), one.next_pod(), one.next_pod(), other.node(0)]
    assert len(set(addresses)) == len(addresses)
    number = one.number
    one.release()
    other.release()
    taken = [LoopbackBlock.acquire() for _ in range(3)]
    assert len({block.number for block in taken}) == 3
    assert number in range(16, 250)
    for block in taken:
        block.release()


# A parent that starts one of our programs, says its pid and waits to be killed.
PARENT = """
import subprocess, sys
child = subprocess.Popen({command!r}, env={env!r} | {{"TOKENFACTORY_PARENT": str(__import__("os").getpid())}})
print(child.pid, flush=True)
child.wait()
"""


def test_a_program_ends_when_its_parent_is_killed():
    command = [*PROGRAM, "wait-cap", "--port=1", "--node-ip=127.0.0.1", "--pod-uid=none"]
    script = PARENT.format(command=command, env=environment())
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for(lambda: b"wait-cap" in _command_line(child), "the program runs")
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not _alive(child), "the program ended")


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
