"""The command line in a process that ends with the one that started it, however that went (`processes.PROGRAM`)."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

PARENT_VARIABLE: Final = "TOKENFACTORY_PARENT"
_PR_SET_PDEATHSIG: Final = 1


def end_with(parent: int) -> None:
    """The kernel kills us once the parent's thread is gone; where it cannot, `stop` must have been called."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we had asked
            sys.exit(1)


if __name__ == "__main__":
    end_with(int(os.environ.pop(PARENT_VARIABLE)))
    runpy.run_module("tokenfactory.cli", run_name="__main__", alter_sys=True)
