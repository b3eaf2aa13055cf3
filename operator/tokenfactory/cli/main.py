"""`tokenfactory …`, also `kubectl tokenfactory …`.

One module per group of commands. They import what they need inside the commands, so that help and
completion answer at once.
"""

from __future__ import annotations

import typer

from tokenfactory.cli import agent, checkpoint, cluster, demo, explain, operator

app = typer.Typer(
    name="tokenfactory",
    help="Run a token factory: the most tokens from a fixed number of megawatts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cluster.app, name="cluster")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(demo.demo)
app.command()(operator.operator)
app.command()(explain.explain)
app.command(name="agent")(agent.agent)
app.command(name="wait-cap")(agent.wait_cap)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
