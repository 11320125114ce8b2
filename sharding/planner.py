"""Which stage holds what: costs + devices -> `Plan`, or the reason why not with numbers.

Not here: asking a machine what memory it has, and placing actors. Pure functions on integers: the
same costs and devices give the same plan everywhere, and `longspan plan` needs no GPU to answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from math import inf, lcm

from sharding.batch import CHUNK, PAGE_SLOTS
from sharding.cost import ModelCosts, activation_bytes, buffer_bytes
from sharding.errors import ConfigError, DoesNotFitError
from sharding.model.arch import ModelShape


@dataclass(frozen=True)
class Device:
    """Memory that one stage may fill."""

    name: str
    free_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage: layers `[layers.start, layers.stop)` on a device, and the bytes they take."""

    device: Device
    layers: range
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that the stage allocates."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.buffer_bytes

    @property
    def headroom_bytes(self) -> int:
        """What the device has left; never below 0 in a plan that `make_plan` returned."""
        return self.device.free_bytes - self.total_bytes


@dataclass(frozen=True)
class Plan:
    """Stages in the order of their layers. `context`: tokens of KV that were asked for;
    `kv_tokens`: the same in whole pages of `page_slots`, which every stage holds for its layers.

    `window_pages`: what layers with a window hold instead, if others see all; a request takes at
    most `ring_pages` of them, which hold a `window` of tokens and a chunk. 0 where there are no
    such layers.
    """

    stages: tuple[StagePlan, ...]
    context: int
    kv_tokens: int
    page_slots: int
    window_pages: int = 0
    ring_pages: int = 0
    window: int = 0

    @property
    def pages(self) -> int:
        """Pages that every stage reserves."""
        return self.kv_tokens // self.page_slots

    @property
    def kv_bytes(self) -> int:
        """KV of all stages together."""
        return sum(stage.kv_bytes for stage in self.stages)


def make_plan(
    costs: ModelCosts,
    devices: Sequence[Device],
    kv_tokens: int,
    chunk_tokens: int = CHUNK,
    request_tokens: int | None = None,
) -> Plan:
    """Cut the layers into one stage per device, in the given order: of the splits that fit, one
    whose slowest stage has the least work, since a pipeline is as fast as that; of those one whose
    fullest device is as empty as it can be (the largest `total_bytes / free_bytes` is least).

    `kv_tokens` is rounded up to whole pages; a request takes at most `request_tokens` of them, or
    all. Among equals the second fullest device decides, and so
    on; then earlier stages get fewer layers. Extra layers belong on later stages: later chunks of a
    prompt cost more, so while a late stage works on one chunk, the next and dearer chunk is already
    on the stages before it and would be the one to wait for. Raises `ConfigError` for impossible
    numbers and `DoesNotFitError` with the largest context that fits.
    """
    _check(costs, devices, chunk_tokens)
    if kv_tokens < 1:
        raise ConfigError(f"a context of {kv_tokens} tokens was asked for; it must be at least 1")
    demand = _Demand(costs, kv_tokens, chunk_tokens, request_tokens)
    if not _any_fits(demand, devices):
        raise _does_not_fit(demand, devices, _best(demand, devices))
    return _best(demand, devices, _least_work(demand, devices))


def largest_context(
    costs: ModelCosts,
    devices: Sequence[Device],
    chunk_tokens: int = CHUNK,
    request_tokens: int | None = None,
) -> int:
    """Most tokens of KV that any split over these devices holds, in whole pages; 0 if not a page.
    A request takes at most `request_tokens` of them, or all.

    Exact: no stage's bytes fall with a page more, so bisection over pages finds the border. Raises
    `ConfigError` as `make_plan` does.
    """
    _check(costs, devices, chunk_tokens)
    whole = costs.layers - costs.shape.windows_within(0, costs.layers)
    page_bytes = PAGE_SLOTS * whole * costs.kv_bytes_per_token_per_layer
    fits, too_many = 0, sum(device.free_bytes for device in devices) // page_bytes + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        demand = _Demand(costs, middle * PAGE_SLOTS, chunk_tokens, request_tokens)
        if _any_fits(demand, devices):
            fits = middle
        else:
            too_many = middle
    return fits * PAGE_SLOTS


def _check(costs: ModelCosts, devices: Sequence[Device], chunk_tokens: int) -> None:
    if not devices:
        raise ConfigError("no device was given; at least 1 is needed")
    if len(devices) > costs.layers:
        raise ConfigError(
            f"{len(devices)} stages, one a device, for {costs.layers} layers: each needs a layer, "
            f"use at most {costs.layers}"
        )
    for device in devices:
        if device.free_bytes < 1:
            raise ConfigError(f"device {device.name} has {device.free_bytes} bytes free")
    if chunk_tokens < 1:
        raise ConfigError(f"chunks of {chunk_tokens} tokens were asked for; at least 1 is needed")


_WINDOW_SHARE = 4
"""Layers with a window hold at least one page for so many of the others: where requests are long,
shorter ones would soon fill what those need."""


def ring_pages(shape: ModelShape, chunk_tokens: int) -> int:
    """Pages of a request in layers with a window: they hold what the first token of the longest
    chunk sees and the chunk. 0 for a model without such layers beside others."""
    slots = shape.window + chunk_tokens - 1
    return -(-slots // PAGE_SLOTS) if shape.mixes_windows else 0


def window_pages(ring: int, pages: int, request_pages: int) -> int:
    """What layers with a window hold where the others hold so many pages: enough for as many of the
    largest requests as these hold."""
    if not ring:
        return 0
    for_all = -(-pages * min(ring, request_pages) // request_pages)
    return min(pages, max(min(ring, pages), for_all, -(-pages // _WINDOW_SHARE)))


class _Demand:
    """What stages of a model need for a given context. A stage's bytes only grow when it gains a
    layer at either end: both searches below rely on it."""

    def __init__(
        self, costs: ModelCosts, context: int, chunk_tokens: int, request_tokens: int | None
    ) -> None:
        self.costs = costs
        self.context = context
        self.kv_tokens = -(-context // PAGE_SLOTS) * PAGE_SLOTS
        self.chunk_tokens = chunk_tokens
        self.request_tokens = request_tokens
        longest = min(context, request_tokens or context)
        self.ring_pages = ring_pages(costs.shape, chunk_tokens)
        self.window_pages = window_pages(
            self.ring_pages, self.kv_tokens // PAGE_SLOTS, -(-longest // PAGE_SLOTS)
        )
        self.total_bytes = cache(self._total_bytes)

    def stage(self, device: Device, start: int, stop: int) -> StagePlan:
        costs, last = self.costs, stop == self.costs.layers
        windows = costs.shape.windows_within(start, stop)
        slots = (stop - start - windows) * self.kv_tokens
        slots += windows * self.window_pages * PAGE_SLOTS
        return StagePlan(
            device=device,
            layers=range(start, stop),
            weights_bytes=costs.weights_bytes(start, stop),
            kv_bytes=slots * costs.kv_bytes_per_token_per_layer,
            activation_bytes=activation_bytes(
                costs.shape,
                self.chunk_tokens,
                last=last,
                workspace_bytes=costs.workspace_bytes,
            ),
            buffer_bytes=buffer_bytes(costs.shape, self.chunk_tokens),
        )

    def _total_bytes(self, start: int, stop: int) -> int:
        return self.stage(Device("any", 1), start, stop).total_bytes


_Split = tuple[tuple[int, ...], tuple[int, ...]]
"""Shares of the devices by falling size, then the first layer of each stage: the better of two
splits is the smaller tuple."""


def _best(demand: _Demand, devices: Sequence[Device], most_work: float = inf) -> Plan:
    """The best split into stages of at most `most_work`, which there must be, whether or not it
    fits; by dynamic programming from the last stage back.

    `best[start]` is the best way to put layers `[start, layers)` on the stages from `index` on. A
    share is multiplied by the least common multiple of all sizes: exact integers, no rounding.
    """
    layers, common = demand.costs.layers, lcm(*(device.free_bytes for device in devices))
    best: dict[int, _Split] = {layers: ((), ())}
    for index in reversed(range(len(devices))):
        scale, after = common // devices[index].free_bytes, best
        starts = range(index, max(after)) if index else range(1)
        found = ((start, _best_from(demand, start, scale, after, most_work)) for start in starts)
        best = {start: split for start, split in found if split is not None}
    starts_of = best[0][1]
    stages = map(demand.stage, devices, starts_of, (*starts_of[1:], layers))
    return Plan(
        tuple(stages),
        demand.context,
        demand.kv_tokens,
        PAGE_SLOTS,
        demand.window_pages,
        demand.ring_pages,
        demand.costs.shape.window if demand.ring_pages else 0,
    )


def _best_from(
    demand: _Demand, start: int, scale: int, after: Mapping[int, _Split], most_work: float
) -> _Split | None:
    """The best split of layers `[start, layers)`, given the best of what comes `after` a stage
    that begins at `start`; None if work allows none."""
    found: _Split | None = None
    for stop in range(max(start + 1, min(after)), max(after) + 1):
        share = demand.total_bytes(start, stop) * scale
        if demand.costs.work(start, stop) > most_work or (found and share > found[0][0]):
            break  # too much, or the fullest already; and every later stop makes it more
        if stop in after:
            shares, starts = after[stop]
            split = tuple(sorted((*shares, share), reverse=True)), (start, *starts)
            found = split if found is None else min(found, split)
    return found


def _least_work(demand: _Demand, devices: Sequence[Device]) -> int:
    """Of the slowest stage, over all splits that fit; one does."""
    layers, work = demand.costs.layers, demand.costs.work
    possible = {work(0, count) for count in range(1, layers)}
    possible |= {work(layers - count, layers) for count in range(1, layers + 1)}
    ordered = sorted(possible)
    return ordered[bisect_left(ordered, True, key=lambda most: _any_fits(demand, devices, most))]


def _any_fits(demand: _Demand, devices: Sequence[Device], most_work: float = inf) -> bool:
    """Whether any split into stages of at most `most_work` fits, in one pass over the layers per
    device.

    `ends`: where the stages so far can end, ascending. A stage that starts later reaches at least
    as far, so the farthest end only moves forward. An end that leaves too few layers for the stages
    to come dies out by itself.
    """
    layers, work = demand.costs.layers, demand.costs.work
    ends = [0]
    for device in devices:
        starts, ends, far = ends, [], 0
        for start in starts:
            far = max(far, start)
            while (
                far < layers
                and work(start, far + 1) <= most_work
                and demand.total_bytes(start, far + 1) <= device.free_bytes
            ):
                far += 1
                ends.append(far)
    return layers in ends


def _does_not_fit(demand: _Demand, devices: Sequence[Device], plan: Plan) -> DoesNotFitError:
    costs, rest = demand.costs, (demand.chunk_tokens, demand.request_tokens)
    longest = largest_context(costs, devices, *rest)
    if longest == 0:
        return DoesNotFitError(_weights_message(costs, devices, demand.chunk_tokens), 0)
    on = "1 stage" if len(devices) == 1 else f"{len(devices)} stages"
    fitting = _best(_Demand(costs, longest, *rest), devices)
    free = sum(stage.headroom_bytes for stage in fitting.stages) + fitting.kv_bytes
    # Whole layers seldom fill every device, so the sum can suffice where no split does.
    unusable = ", but no split by whole layers can use all of it" if free >= plan.kv_bytes else ""
    return DoesNotFitError(
        f"context of {plan.context} needs {format_bytes(plan.kv_bytes)} of KV on {on}, "
        f"{format_bytes(free)} is free for it{unusable}; the largest that fits is {longest}; "
        "use a shorter context or add a device",
        longest,
    )


def _weights_message(costs: ModelCosts, devices: Sequence[Device], chunk_tokens: int) -> str:
    """Which stages lack how much, in the best split for the shortest context there is."""
    plan = _best(_Demand(costs, PAGE_SLOTS, chunk_tokens, None), devices)
    lacks = [
        f"stage {index} on {stage.device.name} lacks {format_bytes(-stage.headroom_bytes)} "
        f"(layers [{stage.layers.start}, {stage.layers.stop}) need "
        f"{format_bytes(stage.weights_bytes)} for weights, {format_bytes(stage.kv_bytes)} for one "
        f"page of KV, {format_bytes(stage.activation_bytes + stage.buffer_bytes)} for activations "
        f"and buffers; {format_bytes(stage.device.free_bytes)} is free)"
        for index, stage in enumerate(plan.stages)
        if stage.headroom_bytes < 0
    ]
    return (
        "the model does not fit, even without context: " + ", ".join(lacks) + "; "
        "add a device, use larger ones or a smaller quantisation of the model"
    )


_PREFIXES = ("", "K", "M", "G", "T")
_UNITS = {f"{prefix}B": 1000**power for power, prefix in enumerate(_PREFIXES)} | {
    f"{prefix}iB": 1024**power for power, prefix in enumerate(_PREFIXES) if power
}
_FACTORS = {"": 1} | {unit.upper(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)")
_MOST_BYTES = 1 << 50  # 1 PiB: beyond any device, so a slip of the keyboard


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "24GB", "1.5 GiB" or "1000" (no unit: bytes), rounded down.

    Units ignore case; a bare "G" is refused because it means two things. Raises `ConfigError` for
    anything else, for less than 1 byte and for more than 1 PiB.
    """
    found = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(found[2].upper()) if found else None
    if found is None or factor is None:
        raise ConfigError(
            f"{text!r:.60} is not a size; write a number and one of {', '.join(_UNITS)}, like 24GiB"
        )
    size = int(Decimal(found[1]) * factor)
    if not 1 <= size <= _MOST_BYTES:
        raise ConfigError(f"{text!r:.60} is {size} bytes, outside [1, {_MOST_BYTES}]")
    return size


def format_bytes(n: int) -> str:
    """A size for people, like "34.4 GiB"; `n` is at least 0."""
    if n < 1024:
        return f"{n} B"
    value, unit = n / 1024, 1
    while round(value, 1) >= 1024 and unit < len(_PREFIXES) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_PREFIXES[unit]}iB"
