"""Loopback addresses of one simulated site: nodes and pods have fixed ports, so every site needs addresses of its own.

All of 127.0.0.0/8 is this machine. A site takes one 127.x.0.0/16 at random and holds it by a socket that nobody else
can bind as long as this process lives, however it ends.
"""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass, field
from typing import Final

_LOCK_PORT: Final = 4790
_FIRST, _LAST = 16, 250


class NoAddressesError(RuntimeError):
    """Every block is taken."""


@dataclass
class LoopbackBlock:
    """`127.<number>.0.0/16`, ours until `release`."""

    number: int
    _lock: socket.socket
    _pods: int = field(default=0)

    @classmethod
    def acquire(cls) -> LoopbackBlock:
        for number in random.sample(range(_FIRST, _LAST), _LAST - _FIRST):
            lock = socket.socket()
            try:
                lock.bind((f"127.{number}.255.254", _LOCK_PORT))
                lock.listen(1)
            except OSError as error:
                lock.close()
                if error.errno in {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES}:
                    continue
                raise
            return cls(number, lock)
        raise NoAddressesError(
            "every block of loopback addresses is taken: end some of the sites that run here"
        )

    def release(self) -> None:
        self._lock.close()

    def node(self, index: int) -> str:
        return f"127.{self.number}.{index // 250}.{index % 250 + 1}"

    def next_pod(self) -> str:
        """Never given twice: a late client of an old pod must not reach a new one."""
        self._pods += 1
        return f"127.{self.number}.{100 + self._pods // 250}.{self._pods % 250 + 1}"
