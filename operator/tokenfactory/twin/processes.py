"""Starting this product's own programs, from a checkout as from an installed wheel, so that they end with us."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import tokenfactory
from tokenfactory.twin.child import PARENT_VARIABLE

PROGRAM: Final = (sys.executable, "-m", "tokenfactory.twin.child")
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "XDG_CACHE_HOME", "TMPDIR")


def environment(**more: str) -> dict[str, str]:
    """Little of ours, so that a simulated node or pod sees what a real one would; and where the package lies."""
    env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    env["PYTHONPATH"] = str(Path(tokenfactory.__file__).resolve().parents[1])
    env["PYTHONFAULTHANDLER"] = "1"  # a crash in a native library says where
    env[PARENT_VARIABLE] = str(os.getpid())
    return env | more
