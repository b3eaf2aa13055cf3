"""`tokenfactory checkpoint …`: what runs in a model's pod to restore and keep its cache."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import msgspec
import typer

app = typer.Typer(help="Restore and keep a model's cache (runs inside its pod).", no_args_is_help=True)

Cache = Annotated[Path, typer.Option(help="The model's cache folder.")]
Store = Annotated[Path, typer.Option(help="Where checkpoints lie.")]
IdentityOption = Annotated[list[str], typer.Option(help="A fact that must match, as key=value.")]


@app.command()
def restore(
    cache: Cache,
    store: Store,
    identity: IdentityOption,
    restore_from: Annotated[
        str, typer.Option(envvar="RESTORE_FROM", help="<folder>@sha256:<digest>, or empty for a cold start.")
    ] = "",
    termination_log: Annotated[
        Path, typer.Option(envvar="TERMINATION_LOG", help="Told to the operator.")
    ] = Path("/dev/termination-log"),
) -> None:
    """Fill the cache from a verified checkpoint. A start without one is cold and says why; it never fails."""
    from tokenfactory.checkpoints import warm_cache

    folder, _, digest = restore_from.partition("@")
    where = (store / folder).resolve()
    if not folder or not digest:
        result = warm_cache.Restored(cold_because="no checkpoint was recorded for this model")
    elif not where.is_relative_to(store.resolve()):
        result = warm_cache.Restored(cold_because=f"{folder} is outside the checkpoint volume")
    else:
        cache.mkdir(parents=True, exist_ok=True)
        result = warm_cache.restore(where, digest, cache, parse_identity(identity))
    text = msgspec.json.encode(result).decode()
    print(text)
    if termination_log.parent.is_dir():
        termination_log.write_text(text)


@app.command()
def keep(
    cache: Cache,
    store: Store,
    identity: IdentityOption,
    every_seconds: Annotated[int, typer.Option(help="How often a new state is captured.")] = 1800,
    keep: Annotated[int, typer.Option(help="How many are kept.")] = 3,
    port: Annotated[int, typer.Option(help="Where the operator asks what was saved.")] = 8011,
    ready_url: Annotated[str, typer.Option(help="Answers 200 when the model serves.")] = "",
) -> None:
    """Save the cache once the model serves, then every so often, and tell the operator what there is."""
    from tokenfactory.checkpoints.keeper import Keeper, http_server, serving

    pod_ip = os.environ.get("POD_IP", "127.0.0.1")
    url = ready_url or f"http://{pod_ip}:8000/v1/health/ready"
    keeper = Keeper(
        cache=cache, store=store, identity=parse_identity(identity), keep=keep, serving=lambda: serving(url)
    )
    server = http_server(keeper, (pod_ip, port))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.stop())
    keeper.run(every_seconds)
    server.shutdown()


def parse_identity(pairs: list[str]) -> dict[str, str]:
    facts = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} is no fact: write --identity=key=value")
        facts[key] = value
    return facts
