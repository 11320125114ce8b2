"""How a benchmark reports: JSON lines with machine, commit and command, optionally kept in a
file."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import typer

from serving.machine import describe_commit, describe_machine

RESULTS = Path(__file__).parent / "results"


def _command(name: str) -> str:
    """As anybody would type it: without whose home it was."""
    said = " ".join(["python", "-m", f"bench.{name}", *sys.argv[1:]])
    return said.replace(str(Path.home()), "~")


class Report:
    """Prints each row as it comes; `keep` also writes them to `results/<name>.json`.

    `variant`: what else tells one kept file from another, as in `results/<name>-<variant>.json`.
    """

    def __init__(self, name: str, keep: bool, variant: str = "") -> None:
        kept_as = f"{name}-{variant}" if variant else name
        self._path = RESULTS / f"{kept_as}.json" if keep else None
        self._rows: list[str] = []
        self._about = {
            "machine": describe_machine(),
            "commit": describe_commit(),
            "command": _command(name),
            "date": datetime.now(UTC).date().isoformat(),
        }

    def row(self, **figures: str | float) -> None:
        """One measurement."""
        line = json.dumps(figures | self._about)
        typer.echo(line)
        self._rows.append(line)
        if self._path is not None:
            self._path.write_text("\n".join(self._rows) + "\n")
