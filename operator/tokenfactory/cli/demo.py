"""`tokenfactory demo`: a running factory on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def demo(
    scenario: Annotated[str, typer.Option(help="story: until Ctrl-C; smoke: ends by itself.")] = "story",
    folder: Annotated[
        Path | None, typer.Option(help="Where it runs; absent: a new folder, removed after.")
    ] = None,
) -> None:
    """A real control plane, four simulated GPU nodes and a factory; then a node dies."""
    if scenario not in {"story", "smoke"}:
        raise typer.BadParameter(f"there is no scenario {scenario!r}: write story or smoke")
    from tokenfactory.twin.demo import run
    from tokenfactory.twin.site import SiteError

    where = folder or Path(tempfile.mkdtemp(prefix="tokenfactory-demo-"))
    done = False
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(where, smoke=scenario == "smoke", say=lambda text: print(text, flush=True)))
        done = True
    except SiteError as error:
        print(f"failed: {error}")
        raise typer.Exit(1) from None
    finally:
        if done and folder is None:
            shutil.rmtree(where, ignore_errors=True)
