"""Starting this product's own programs, from a checkout as from an installed wheel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tokenfactory

PROGRAM = (sys.executable, "-m", "tokenfactory.cli")
_PASSED_ON = ("PATH", "HOME", "LANG", "XDG_CACHE_HOME", "TMPDIR")


def environment(**more: str) -> dict[str, str]:
    """Little of ours, so that a simulated node or pod sees what a real one would; and where the package lies."""
    env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    env["PYTHONPATH"] = str(Path(tokenfactory.__file__).resolve().parents[1])
    return env | more
