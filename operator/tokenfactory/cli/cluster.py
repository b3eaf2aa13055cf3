"""`tokenfactory cluster`: a real control plane on this machine, to try things on."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tokenfactory.twin.cluster import Cluster

app = typer.Typer(help="A real Kubernetes control plane on this machine.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Option(help="Where everything of the cluster is kept.", show_default="one in the user's cache"),
]


@app.command()
def up(
    folder: Folder = None,
    apply: Annotated[
        list[Path] | None, typer.Option(help="Manifests to apply once it runs; may be given again.")
    ] = None,
) -> None:
    """Start the cluster, or find that it runs. It outlives this command: `down` ends it."""
    with _explained():
        from tokenfactory.twin.cluster import Cluster
        from tokenfactory.twin.components import AlreadyRunsError

        where = _folder(folder)
        try:
            cluster = Cluster.up(where, detached=True)
        except AlreadyRunsError:
            cluster = Cluster.join(where)
            typer.echo(f"the cluster in {where} runs already")
        for manifests in apply or []:
            cluster.kubectl("apply", "--server-side", "-R", "-f", str(manifests))
            typer.echo(f"applied {manifests}")
    _say_how_to_use(cluster, folder)


def _say_how_to_use(cluster: Cluster, folder: Path | None) -> None:
    programs = cluster.program("kubectl").parent
    option = f" --folder {shlex.quote(str(folder))}" if folder else ""
    typer.echo(
        f"{cluster.server} is ready. To use it with the kubectl that fits it:\n"
        f"  export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}\n"
        f'  export PATH={shlex.quote(str(programs))}:"$PATH"\n'
        f"It ends with: tokenfactory cluster down{option}"
    )


@app.command()
def down(
    folder: Folder = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove its objects, certificates and logs too.")
    ] = False,
) -> None:
    """End the cluster. What was stored in it is kept for the next `up`, unless --remove."""
    with _explained():
        import shutil

        from tokenfactory.twin import cluster_folder
        from tokenfactory.twin.cluster import Cluster

        where = _folder(folder)
        cluster = Cluster.attach(where)
        ran = cluster_folder.is_locked(where)
        cluster.down()
        typer.echo(f"the cluster in {where} {'has ended' if ran else 'did not run'}")
        if remove:
            shutil.rmtree(where)
            typer.echo(f"removed {where}")


@app.command()
def status(folder: Folder = None) -> None:
    """Say what runs. Exits with 1 when the cluster does not run, or not all of it."""
    with _explained():
        from tokenfactory.twin import cluster_folder
        from tokenfactory.twin.cluster import Cluster

        cluster = Cluster.attach(_folder(folder))
        if not cluster_folder.is_locked(cluster.folder):
            typer.echo(f"the cluster in {cluster.folder} does not run; `tokenfactory cluster up` starts it")
            raise typer.Exit(1)
        alive = cluster.running()
        known = sorted(cluster.state().get("components", {}).items())
    for name, component in known:
        ended = f"ended with {component.get('exit')}: see {cluster.folder}/logs/{name}.log"
        typer.echo(f"{name:<26} {f'runs, pid {alive[name]}' if name in alive else ended}")
    typer.echo(f"{'server':<26} {cluster.server}\n{'kubeconfig':<26} {cluster.kubeconfig}")
    if len(alive) < len(known):
        raise typer.Exit(1)


@app.command()
def tools() -> None:
    """Find or build every program that the tests use, and say where each is."""
    with _explained():
        from tokenfactory.twin import toolchain

        typer.echo(f"control plane  {toolchain.ensure_control_plane()}")
        typer.echo(f"helm           {toolchain.ensure_helm()}")
        typer.echo(f"kubeconform    {toolchain.ensure_kubeconform()}")
        typer.echo(f"lws            {toolchain.ensure_lws()}")
        typer.echo(f"promtool       {toolchain.ensure_promtool()}")


def _folder(given: Path | None) -> Path:
    from tokenfactory.twin.workshop import cache_folder

    return (given or cache_folder() / "clusters" / "default").absolute()


@contextmanager
def _explained() -> Iterator[None]:
    """What a user can mend is one line on stderr, without a traceback."""
    from tokenfactory.twin.components import ClusterError
    from tokenfactory.twin.pki import PkiError
    from tokenfactory.twin.workshop import ToolError

    try:
        yield
    except (ClusterError, PkiError, ToolError) as error:
        if os.environ.get("TOKENFACTORY_TRACEBACK"):
            raise
        typer.echo(f"tokenfactory: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        typer.echo(f"tokenfactory: {error}: --folder chooses another place", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("tokenfactory: interrupted; what was started has been ended again", err=True)
        raise typer.Exit(130) from None
