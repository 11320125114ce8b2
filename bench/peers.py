"""This engine and llama.cpp in turn, on the same file, threads and depths.

    python -m bench.peers MODEL --peer SCRIPT [--threads 2] [--depths 128,512] [--rounds 3] …

For each depth two rows: `pp512`, prompt tokens a second for so many random tokens on an empty
cache, and `tg48 @ d512`, tokens a second of the 48 drawn right after it. `mode` is how this engine
ran: "in process" (`longspan bench`), or with `--serve` also behind HTTP (`bench/http_rates.py`).
llama.cpp always runs in its own process, measured by its own clock, by the script `--peer`: called
with MODEL, --threads, --depths and --tokens, it prints a JSON line per depth with `pp_tok_s` and
`tg_tok_s`.

A round runs every engine once, the next one backwards, so that a machine that slowly changes its
speed favours nobody. `tok_s` and `peer_tok_s` are medians over rounds, `ratio` is the median of the
rounds' ratios, `ratio_min` and `ratio_max` their range. Nothing can come from a prefix cache:
prompts are random, and the peer's script switches its cache off.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.http_rates import Served, stream_all
from bench.report import Report
from serving.fetch import resolve_model
from sharding.kernels.cpu import INSTRUCTION_SETS

TOKENS = 48
_LONG = 2000  # the peer's script measures once from here on, three times below

Rates = Mapping[str, float]
"""Tokens a second of each test."""

Engine = Callable[[int], Rates]
"""Measures all tests once; takes the round's number."""


def pp(depth: int) -> str:
    """A prompt's test."""
    return f"pp{depth}"


def tg(depth: int) -> str:
    """A decode's test."""
    return f"tg{TOKENS} @ d{depth}"


@dataclass(frozen=True)
class Setup:
    """What is measured, and how often in a round: as the peer's script does it."""

    path: Path
    threads: int
    depths: Sequence[int]

    @property
    def lengths(self) -> list[int]:
        """Every depth three times, the long ones once."""
        return [depth for depth in self.depths for _ in range(3 if depth < _LONG else 1)]

    def llama_cpp(self, peer: Path) -> Rates:
        """The peer's rates, by its script: medians of its runs."""
        command = [sys.executable, str(peer), str(self.path), "--threads", str(self.threads)]
        command += ["--depths", _listed(self.depths), "--tokens", str(TOKENS)]
        rates: dict[str, float] = {}
        for row in json_lines(command):
            rates[pp(row["depth"])] = row["pp_tok_s"]
            rates[tg(row["depth"])] = row["tg_tok_s"]
        return rates

    def in_process(self) -> Rates:
        """This engine's rates by `longspan bench`: medians of single runs, each after a warm-up."""
        command = [sys.executable, "-m", "serving.cli", "bench", str(self.path), "-r", "1"]
        command += ["--threads", str(self.threads), "--json"]
        lengths = _listed(self.lengths)
        rows = json_lines([*command, "-p", lengths, "-n", "0", "-d", "0"])
        rows += json_lines([*command, "-p", "0", "-n", str(TOKENS), "-d", lengths])
        return medians((row["test"], row["tok_s"]) for row in rows)

    def over_http(self, stages: int, threads: int | None, seed: int) -> Rates:
        """This engine's rates as an HTTP client sees them: medians of its answers."""
        served = Served(self.path, stages, max(self.depths) + TOKENS, threads)
        answers = stream_all(served, self.lengths, TOKENS, seed)
        return medians(
            pair
            for depth, answer in answers
            for pair in ((pp(depth), answer.pp_tok_s), (tg(depth), answer.tg_tok_s))
        )


def medians(pairs: Iterable[tuple[str, float]]) -> Rates:
    """The median of each test."""
    rates: dict[str, list[float]] = {}
    for test, rate in pairs:
        rates.setdefault(test, []).append(rate)
    return {test: statistics.median(some) for test, some in rates.items()}


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def json_lines(command: Sequence[str]) -> list[dict[str, Any]]:
    """A command's output; what it says on stderr passes through."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def rounds_of(engines: Mapping[str, Engine], rounds: int) -> dict[str, list[Rates]]:
    """Every engine's rates, round by round; every other round runs them backwards."""
    found: dict[str, list[Rates]] = {name: [] for name in engines}
    for number in range(rounds):
        order = list(engines) if number % 2 == 0 else list(engines)[::-1]
        for name in order:
            typer.echo(f"round {number + 1} of {rounds}: {name}", err=True)
            found[name].append(engines[name](number))
    return found


def compared(own: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Figures of one test from both engines' rates, round by round."""
    ratios = [a / b for a, b in zip(own, peer, strict=True)]
    return {
        "tok_s": round(statistics.median(own), 2),
        "peer_tok_s": round(statistics.median(peer), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "rounds": len(ratios),
    }


def main(
    model: str,
    peer: Annotated[Path, typer.Option(exists=True, help="Script that runs llama.cpp.")],
    threads: Annotated[int, typer.Option(min=1, help="Of the peer, and in process.")] = 2,
    depths: Annotated[str, typer.Option(help="Prompt lengths.")] = "128,512,4096",
    serve: Annotated[bool, typer.Option(help="Also measure behind HTTP.")] = False,
    stages: Annotated[int, typer.Option(min=1, help="Stages behind HTTP.")] = 2,
    serve_threads: Annotated[
        int | None, typer.Option(help="Threads of each stage behind HTTP; default: the server's.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    keep: Annotated[bool, typer.Option(help="Write results/peers-SET.json.")] = False,
) -> None:
    """Compare on one model."""
    setup = Setup(resolve_model(model), threads, [int(depth) for depth in depths.split(",")])
    engines: dict[str, Engine] = {
        "llama.cpp": lambda number: setup.llama_cpp(peer),
        "in process": lambda number: setup.in_process(),
    }
    if serve:
        mode = f"{stages} stages, HTTP"
        engines[mode] = lambda number: setup.over_http(stages, serve_threads, seed=number)
    report = Report("peers", keep, INSTRUCTION_SETS[0])
    found = rounds_of(engines, rounds)
    peers = found.pop("llama.cpp")
    for mode, own in found.items():
        for test in peers[0]:
            report.row(
                test=test,
                engine="longspan",
                mode=mode,
                model=setup.path.name,
                threads=threads,
                **compared([rates[test] for rates in own], [rates[test] for rates in peers]),
            )


if __name__ == "__main__":
    typer.run(main)
