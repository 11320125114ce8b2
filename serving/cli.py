"""The `longspan` command: fetch, plan, generate, serve, bench, dashboard.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 a failure, 2 wrong usage.
Torch and Ray are imported by the commands that need them, so that `plan` and `--help` answer at
once.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from actors.scheduler import LEAST_CHUNK
from serving.alerts import rules_text
from serving.config import MOST_CHUNK, MOST_ROPE_SCALE, load_config, stretch_of
from serving.dashboard import dashboard as build_dashboard
from serving.fetch import MODELS, resolve_model
from serving.fetch import fetch as fetch_model
from serving.show import bench_heading, bench_line, plan_record, plan_table
from sharding.batch import SamplingParams
from sharding.errors import ConfigError, DoesNotFitError, LongspanError
from sharding.gguf.reader import GGUFFile
from sharding.kernels import cpu_kernels
from sharding.model.arch import read_shape
from sharding.model.rotation import ROPE_SCALINGS, Stretch
from sharding.model_plan import RESIDENT, Wanted, plan_model
from sharding.planner import Device, parse_bytes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="A .gguf file, the first of a split set, or `smollm2`.")]
Stages = Annotated[int, typer.Option(min=1, help="Stages that the layers are divided over.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")]
KernelSet = Annotated[
    str, typer.Option("--kernels", help="auto, cpu (compiled), reference or triton.")
]
Chunk = Annotated[
    int | None,
    typer.Option(
        min=LEAST_CHUNK,
        max=MOST_CHUNK,
        help="Most tokens of a step; default: 512 on CPUs, 4096 on GPUs.",
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(help="none, linear or yarn, in place of the file's; with --rope-scale."),
]
RopeScale = Annotated[
    float | None, typer.Option(help="Read so many times the context it was trained for.")
]
YarnOrigCtx = Annotated[
    int | None, typer.Option(help="The context it was trained for, in place of the file's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
KvDtype = Annotated[str, typer.Option(help="Type of the KV cache; fp16 is the only one yet.")]


def main() -> None:
    """Entry point: our errors become one line and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except LongspanError as error:
        err.print(f"longspan: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:  # a disk or a pipe that takes no more
        err.print(f"longspan: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def _say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"longspan {version('longspan')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Serve GGUF language models in layer stages over Ray."""


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="The model's name.")] = "smollm2") -> None:
    """Download and verify a small model, print its path."""
    typer.echo(fetch_model(name, report=_say))


@app.command()
def plan(
    model: Model,
    context: Annotated[int, typer.Option(min=1, help="Tokens of KV to reserve.")],
    device: Annotated[list[str], typer.Option(help="Memory of a stage's device, such as 24GiB.")],
    kernels: KernelSet = "auto",
    chunk: Chunk = None,
    kv_dtype: KvDtype = "fp16",
    as_json: AsJson = False,
) -> None:
    """Say whether a context fits, and which device would hold what."""
    _only_fp16(kv_dtype)
    wanted = Wanted(context, context, _known_kernels(kernels), chunk)
    sizes = [parse_bytes(text) for text in device]
    devices = [Device(f"device {number}", size) for number, size in enumerate(sizes)]
    path = resolve_model(model, report=_say)
    _warn_untrained(path, context, hint=False)
    with GGUFFile.open(path) as file:
        try:
            planned = plan_model(file, devices, wanted)
        except DoesNotFitError as error:
            if as_json:
                refusal = {"fits": False, "max_context": error.max_context, "stages": []}
                typer.echo(json.dumps(refusal))
            raise
    if as_json:
        typer.echo(json.dumps(plan_record(planned)))
    else:
        Console().print(plan_table(planned))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text.")] = None,
    stages: Stages = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to draw.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Nucleus to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="A file with the JSON schema that it must keep to."),
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="A file with a grammar to follow: GBNF or Lark.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Most tokens in all.")] = None,
    threads: Threads = None,
    kernels: KernelSet = "auto",
    rope_scaling: RopeScaling = None,
    rope_scale: RopeScale = None,
    yarn_orig_ctx: YarnOrigCtx = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text with stages of this process."""
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give either --prompt or --prompt-file")
    text = prompt if prompt is not None else _read_text(prompt_file or Path())
    from serving.generate import Generation, LocalModel, form_of, summary

    form = form_of(json_schema, grammar)
    stretch = _known_stretch(rope_scaling, rope_scale, yarn_orig_ctx)
    path = resolve_model(model, report=_say)
    _warn_untrained(path, context, stretch)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    wanted = Wanted(context, kernels=_known_kernels(kernels), contexts=1, stretch=stretch)
    with LocalModel(path, stages, wanted, threads) as local:
        generation = Generation(local, text, max_tokens, sampling, form)
        for piece in generation.pieces():
            if not as_json:
                typer.echo(piece, nl=False)
    if as_json:
        typer.echo(json.dumps(generation.record()))
    else:
        typer.echo()
        _say(summary(generation))


@app.command()
def serve(
    model: Model,
    stages: Annotated[int | None, typer.Option(help="Stages; 2 by default.")] = None,
    context: Annotated[int | None, typer.Option(help="Most tokens of one request.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens of KV in all.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that HTTP listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port of HTTP.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each stage.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Name that clients ask for.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait.")] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option(help="Keep KV for requests that begin alike; on by default.")
    ] = None,
    chunk: Chunk = None,
    ingress_replicas: Annotated[int | None, typer.Option(help="HTTP processes.")] = None,
    kernels: KernelSet = "auto",
    rope_scaling: RopeScaling = None,
    rope_scale: RopeScale = None,
    yarn_orig_ctx: YarnOrigCtx = None,
    api_key_file: Annotated[str | None, typer.Option(help="API keys, one a line.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call; may be repeated.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: a local one.")] = None,
) -> None:
    """Serve a model over HTTP through stages on Ray, until interrupted."""
    from serving.launch import serve_until_interrupted

    path = resolve_model(model, report=_say)
    chosen = {
        "model": str(path.resolve()),
        "stages": stages,
        "context": context,
        "kv_tokens": kv_tokens,
        "host": host,
        "port": port,
        "threads": threads,
        "model_name": model_name or (model if model in MODELS else None),
        "max_waiting": max_waiting,
        "prefix_cache": prefix_cache,
        "chunk": chunk,
        "ingress_replicas": ingress_replicas,
        "kernels": _known_kernels(kernels),
        "rope_scaling": rope_scaling,
        "rope_scale": rope_scale,
        "yarn_orig_ctx": yarn_orig_ctx,
        "api_key_file": api_key_file,
        "cors_origins": cors_origin,
        "address": address,
    }
    config = load_config({key: value for key, value in chosen.items() if value is not None})
    _warn_untrained(path, context, config.stretch)
    serve_until_interrupted(config, err)


@app.command()
def bench(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", help="Prompt lengths, as in 128,512.")] = "512",
    tokens: Annotated[str, typer.Option("-n", help="Tokens to draw, as in 128.")] = "128",
    depths: Annotated[str, typer.Option("-d", help="Context before it, as in 0,4096.")] = "0",
    runs: Annotated[int, typer.Option("-r", min=1, help="Runs of each row.")] = 3,
    stages: Stages = 1,
    threads: Threads = None,
    kernels: KernelSet = "auto",
    chunk: Chunk = None,
    kv_dtype: KvDtype = "fp16",
    as_json: AsJson = False,
) -> None:
    """Measure prompt and decode rates of stages in this process, row by row as llama-bench does."""
    _only_fp16(kv_dtype)
    from serving.bench import Bencher, bench_cases
    from serving.generate import LocalModel

    cases = bench_cases(*(_numbers(text) for text in (prompt, tokens, depths)))
    path = resolve_model(model, report=_say)
    room = max(case.context for case in cases)
    wanted = Wanted(room, room, _known_kernels(kernels), chunk)
    with LocalModel(path, stages, wanted, threads) as local:
        if not as_json:
            typer.echo(bench_heading())
        bencher = Bencher(local.pipeline, local.vocab, local.limits)
        for case in cases:
            typer.echo(bench_line(bencher.run(case, runs), local, as_json))


@app.command()
def dashboard(
    grafana: Annotated[
        str | None, typer.Option(help="Grafana to put it into, as in http://127.0.0.1:3000.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; else $LONGSPAN_GRAFANA_TOKEN.")
    ] = None,
    datasource: Annotated[
        str | None, typer.Option(help="Uid of the Prometheus to read; Grafana's default one.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Title of the folder that holds it; Longspan by default.")
    ] = None,
    alerts: Annotated[
        bool, typer.Option("--alerts", help="Print Prometheus's alert rules.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a dashboard over /metrics into a Grafana, or print it (--json) for import."""
    if (grafana is not None) + alerts + (as_json and grafana is None) != 1:
        raise ConfigError(
            "give one of --grafana URL, --json, which prints the dashboard, and --alerts, which "
            "prints rules"
        )
    if grafana is None:
        if token_file or folder or (alerts and datasource):
            raise ConfigError(
                "--token-file and --folder are for --grafana, --datasource is for the dashboard"
            )
        typer.echo(rules_text() if alerts else json.dumps(build_dashboard(datasource)))
        return
    from serving.grafana import Grafana, publish, read_token

    with closing(Grafana(grafana, read_token(token_file))) as opened:
        done = publish(opened, datasource, "Longspan" if folder is None else folder)
    typer.echo(json.dumps(msgspec.to_builtins(done)) if as_json else done.url)
    _say(f"version {done.version}, reading from the data source {done.datasource}")


def _known_kernels(name: str) -> str:
    """The name, if it is one; says so where the fast kernels are missing."""
    if name not in ("auto", *RESIDENT):
        raise ConfigError(f"no kernel set {name!r}; there are: auto, {', '.join(RESIDENT)}")
    if name == "auto" and cpu_kernels() == "reference":
        _say(
            "warning: the CPU kernels were not built when Longspan was installed (no C++ "
            "compiler?), so CPUs compute with the reference kernels: many times slower, 4 bytes a "
            "weight"
        )
    return name


def _known_stretch(scaling: str | None, scale: float | None, trained: int | None) -> Stretch | None:
    if scaling is not None and scaling not in ROPE_SCALINGS:
        raise ConfigError(f"no rotary scaling {scaling!r}; there are: {', '.join(ROPE_SCALINGS)}")
    if scale is not None and not 1 <= scale <= MOST_ROPE_SCALE:
        raise ConfigError(f"--rope-scale {scale:g} is outside [1, {MOST_ROPE_SCALE}]")
    if trained is not None and trained < 1:
        raise ConfigError(f"--yarn-orig-ctx {trained} is below 1")
    return stretch_of(scaling, scale, trained)


def _warn_untrained(
    path: Path, context: int | None, stretch: Stretch | None = None, *, hint: bool = True
) -> None:
    with GGUFFile.open(path) as file:
        shape = read_shape(file.metadata, stretch)
    trained = shape.train_context
    if context is None or context <= trained:
        return
    beyond = f"warning: a context of {context}, but the model was trained for {trained}"
    if hint and stretch is None and shape.rotations[0].scale == 1:
        scale = f"{math.ceil(context / trained)}"
        beyond += f"; if its makers say so, --rope-scaling yarn --rope-scale {scale} stretches it"
    _say(beyond)


def _only_fp16(kv_dtype: str) -> None:
    if kv_dtype != "fp16":
        raise ConfigError(f"--kv-dtype {kv_dtype} is unknown; fp16 is the only type yet")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of whole numbers such as 0,4096") from error
    if any(number < 0 for number in numbers):
        raise ConfigError(f"{text!r} has a negative number")
    return numbers


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


if __name__ == "__main__":
    main()
