"""What commands show people: tables, bench rows, sizes. Pure formatting; JSON records stand
beside."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from actors.stats import EngineStats
from serving.machine import describe_commit, describe_machine
from sharding.model_plan import ModelPlan
from sharding.planner import format_bytes

if TYPE_CHECKING:
    from serving.bench import BenchRow
    from serving.generate import LocalModel

_PLAN_SIZES = ("weights", "KV", "work", "total", "headroom")
_BENCH = "| {:<28} | {:>6} | {:>7} | {:>16} | {:>18} |"


def plan_record(planned: ModelPlan) -> dict[str, Any]:
    """A plan as `longspan plan --json` prints it."""
    stages = [
        {
            "device": stage.device.name,
            "layers": [stage.layers.start, stage.layers.stop],
            "weights_bytes": stage.weights_bytes,
            "kv_bytes": stage.kv_bytes,
            "activation_bytes": stage.activation_bytes,
            "buffer_bytes": stage.buffer_bytes,
            "total_bytes": stage.total_bytes,
            "headroom_bytes": stage.headroom_bytes,
        }
        for stage in planned.plan.stages
    ]
    return {
        "fits": True,
        "max_context": planned.max_context,
        "train_context": planned.train_context,
        "stages": stages,
    }


def plan_table(planned: ModelPlan) -> Table:
    """A plan for people."""
    title = f"context {planned.context} fits; the largest that would is {planned.max_context}"
    table = _table(title, ("#", "device", "layers"), _PLAN_SIZES)
    for number, stage in enumerate(planned.plan.stages):
        sizes = (
            stage.weights_bytes,
            stage.kv_bytes,
            stage.activation_bytes + stage.buffer_bytes,
            stage.total_bytes,
            stage.headroom_bytes,
        )
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}"
        table.add_row(str(number), stage.device.name, layers, *map(format_bytes, sizes))
    return table


def stage_table(stats: EngineStats) -> Table:
    """Where the stages run and what they hold."""
    sizes = ("weights", "KV tokens", "KV")
    table = _table("stages", ("stage", "node", "link", "device", "layers"), sizes)
    for stage in stats.stages:
        table.add_row(
            str(stage.stage),
            stage.node,
            stage.link,
            stage.device,
            f"{stage.layers[0]}-{stage.layers[1] - 1}",
            format_bytes(stage.weights_bytes),
            f"{stage.kv_tokens:,}",
            format_bytes(stage.kv_bytes),
        )
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Columns that never wrap: a size cut in two lines cannot be read."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def bench_heading() -> str:
    """The lines above the bench rows, a Markdown table as llama-bench prints it."""
    names = _BENCH.format("model", "stages", "threads", "test", "tok/s")
    rule = re.sub(r"[^|]", "-", names).replace("-|", ":|")
    return f"{names}\n{rule.replace(':|', '-|', 1)}"


def bench_line(row: BenchRow, local: LocalModel, as_json: bool) -> str:
    """One bench row, for people or as JSON."""
    if not as_json:
        rate = f"{row.tok_s:.2f} ± {row.tok_s_sd:.2f}"
        return _BENCH.format(local.path.stem[:28], local.stages, local.threads, row.case.name, rate)
    record = {
        "test": row.case.name,
        "model": local.path.name,
        "stages": local.stages,
        "threads": local.threads,
        "kernels": local.kernels,
        "tok_s": round(row.tok_s, 3),
        "tok_s_sd": round(row.tok_s_sd, 3),
        "runs": row.runs,
        "commit": describe_commit(),
        "machine": describe_machine(),
    }
    return json.dumps(record | asdict(row.case))
