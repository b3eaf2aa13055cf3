"""`python -m tokenfactory.cli`: the command where it is not installed."""

from tokenfactory.cli.main import main

main()
