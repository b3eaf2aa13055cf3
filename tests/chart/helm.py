"""Helm over our chart."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "tokenfactory"
NAMESPACE = "tokenfactory-system"


class HelmError(RuntimeError):
    """Helm refused; the text is what it said."""


class Helm:
    def __init__(self, program: Path) -> None:
        self._program = program

    def run(self, *arguments: str) -> str:
        done = subprocess.run([str(self._program), *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HelmError(done.stderr + done.stdout)
        return done.stdout

    def template(self, *values: str) -> str:
        """With values as `key=value` for --set-json where they are no plain text."""
        sets = [
            part for value in values for part in ("--set-json" if _is_json(value) else "--set-string", value)
        ]
        return self.run("template", "tokenfactory", str(CHART), "-n", NAMESPACE, *sets)

    def lint(self, *values: str) -> str:
        sets = [
            part for value in values for part in ("--set-json" if _is_json(value) else "--set-string", value)
        ]
        return self.run("lint", "--strict", str(CHART), "-n", NAMESPACE, *sets)


def _is_json(value: str) -> bool:
    return value.split("=", 1)[1][:1] in set('{["-0123456789tf')


def objects_of(text: str) -> list[dict[str, Any]]:
    return [body for body in yaml.safe_load_all(text) if body]


def one(objects: list[dict[str, Any]], kind: str, part: str = "") -> dict[str, Any]:
    """The one object of this kind whose name ends with `part`."""
    (found,) = (body for body in objects if body["kind"] == kind and body["metadata"]["name"].endswith(part))
    return found
