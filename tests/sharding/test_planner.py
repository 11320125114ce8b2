"""Plans against brute force over all splits, and what a user reads when a model does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.windows import PagePools
from sharding.batch import PAGE_SLOTS
from sharding.cost import ModelCosts, activation_bytes, buffer_bytes
from sharding.errors import ConfigError, DoesNotFitError
from sharding.model.arch import FAMILIES, ModelShape
from sharding.model.rotation import Rotation
from sharding.planner import (
    Device,
    Plan,
    StagePlan,
    format_bytes,
    largest_context,
    make_plan,
    parse_bytes,
)

GIB = 1 << 30
SMALL = ModelShape(
    family=FAMILIES["llama"],
    name="small",
    layers=1,
    hidden=8,
    ffn=8,
    heads=2,
    kv_heads=2,
    head_dim=4,
    vocab=16,
    train_context=64,
    norm_eps=1e-5,
    rotations=(Rotation(10000.0),),
    rope_dims=4,
)
SEVEN_B = replace(
    SMALL, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
)
COSTS_7B = ModelCosts(SEVEN_B, (115 << 20,) * 32, 70 << 20, 103 << 20, 0)
FIXED = activation_bytes(SMALL, 1, last=False) + buffer_bytes(SMALL, 1)


def costs_of(
    layer_bytes: tuple[int, ...], ends: tuple[int, int] = (0, 0), every: int = 0
) -> ModelCosts:
    """A model of the small shape with these weights; `ends`: embedding and output. The last layer
    of `every` sees all, the others 40 tokens."""
    shape = replace(SMALL, layers=len(layer_bytes), window=40 * bool(every), global_every=every)
    return ModelCosts(shape, layer_bytes, ends[0], ends[1], 0)


def sizes(*free_bytes: int) -> list[Device]:
    """Devices that have so much beyond what every stage needs for activations and buffers."""
    return [Device(f"gpu{i}", FIXED + free) for i, free in enumerate(free_bytes)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelCosts, list[Device], int]:
    """Small models on few devices with 60% to 300% of an even share: some fit, some do not."""
    weights = st.sampled_from([1_000, 2_000, 3_000]) | st.integers(1, 5_000)
    stages = draw(st.sampled_from([1, 2, 3, 4]))
    layer_bytes = draw(st.lists(weights, min_size=stages, max_size=7))
    head, tied, kv_tokens = draw(weights), draw(st.booleans()), draw(st.integers(1, 200))
    embedding = head if tied else draw(weights)
    every = draw(st.sampled_from([0, 0, 2, 3]))
    costs = costs_of(tuple(layer_bytes), (embedding, head + 32), every)
    even = (sum(layer_bytes) + embedding + head + len(layer_bytes) * kv_tokens * 32) // stages
    percents = draw(
        st.lists(st.sampled_from([60, 100, 150, 300]), min_size=stages, max_size=stages)
    )
    devices = sizes(*(even * percent // 100 for percent in percents))
    return replace(costs, tied_bytes=head if tied else 0), devices, kv_tokens


def all_splits(
    costs: ModelCosts, devices: list[Device], kv_tokens: int
) -> Iterator[tuple[list[Fraction], list[int], int]]:
    """Every split's shares by falling size, its layer counts, and the most work of a stage, twice
    the layers' mean size and once the head's; written without the planner."""
    slots = (kv_tokens + PAGE_SLOTS - 1) // PAGE_SLOTS * PAGE_SLOTS
    layers, every = len(costs.layer_bytes), costs.shape.global_every
    pages = slots // PAGE_SLOTS
    ring = 3 if every and 1 < every <= layers else 0  # of 40 tokens and a chunk of 1
    window_slots = min(pages, max(ring, (pages + 3) // 4)) * PAGE_SLOTS
    for cuts in combinations(range(1, layers), len(devices) - 1):
        shares, counts, most_work = [], [], 0
        for device, start, stop in zip(devices, (0, *cuts), (*cuts, layers), strict=True):
            whole = [not ring or layer % every == every - 1 for layer in range(start, stop)]
            held = sum(slots if each else window_slots for each in whole)
            used = sum(costs.layer_bytes[start:stop]) + held * 2 * 8 * 2
            used += costs.embedding_bytes if start == 0 else 0
            used += costs.output_bytes if stop == layers else 0
            used -= costs.tied_bytes if stop - start == layers else 0
            used += activation_bytes(costs.shape, 1, last=stop == layers)
            used += buffer_bytes(costs.shape, 1)
            shares.append(Fraction(used, device.free_bytes))
            counts.append(stop - start)
            work = 2 * (stop - start) * (sum(costs.layer_bytes) // layers)
            most_work = max(most_work, work + (costs.output_bytes if stop == layers else 0))
        yield sorted(shares, reverse=True), counts, most_work


def layer_counts(plan: Plan) -> list[int]:
    """Layers of each stage."""
    return [len(stage.layers) for stage in plan.stages]


def plan_or_none(costs: ModelCosts, devices: list[Device], kv_tokens: int) -> Plan | None:
    """A plan with chunks of one token, None if it does not fit."""
    try:
        return make_plan(costs, devices, kv_tokens, 1)
    except DoesNotFitError:
        return None


@settings(max_examples=300)
@given(problems())
def test_a_plan_is_the_best_of_all_splits_and_exists_if_one_fits(
    problem: tuple[ModelCosts, list[Device], int],
) -> None:
    """A greedy cut fills one device while another idles, or refuses what fits; one by bytes alone
    leaves most of the work to one stage."""
    splits = all_splits(*problem)
    fitting = [(work, shares, counts) for shares, counts, work in splits if shares[0] <= 1]
    plan = plan_or_none(*problem)
    assert (plan is not None) == bool(fitting)
    _, shares, counts = min(fitting, default=(0, [], []))
    if plan is not None:
        assert layer_counts(plan) == counts
        found = [Fraction(stage.total_bytes, stage.device.free_bytes) for stage in plan.stages]
        assert sorted(found, reverse=True) == shares


@settings(max_examples=300)
@given(problems())
def test_the_largest_context_fits_and_a_page_more_does_not(
    problem: tuple[ModelCosts, list[Device], int],
) -> None:
    """Off by a page either wastes memory or promises what then fails."""
    costs, devices, _ = problem
    longest = largest_context(costs, devices, 1)
    assert longest % PAGE_SLOTS == 0
    assert longest == 0 or min(all_splits(costs, devices, longest))[0][0] <= 1
    assert min(all_splits(costs, devices, longest + 1))[0][0] > 1


@given(problems(), st.integers(0, 100_000))
def test_more_memory_never_shortens_the_context(
    problem: tuple[ModelCosts, list[Device], int], more: int
) -> None:
    """A user who adds memory must not lose context by a different cut."""
    costs, devices, _ = problem
    grown = [Device(devices[0].name, devices[0].free_bytes + more), *devices[1:]]
    assert largest_context(costs, grown, 1) >= largest_context(costs, devices, 1)


@given(problems())
def test_a_refusal_names_the_context_that_then_works(
    problem: tuple[ModelCosts, list[Device], int],
) -> None:
    """The remedy in the message must be true."""
    costs, devices, kv_tokens = problem
    try:
        make_plan(costs, devices, kv_tokens, 1)
    except DoesNotFitError as error:
        assert error.max_context < kv_tokens
        assert error.max_context == 0 or plan_or_none(costs, devices, error.max_context)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 600), st.integers(1, 8))
def test_layers_with_a_window_hold_what_as_many_full_requests_need(
    request_tokens: int, requests: int, chunk: int, layers: int
) -> None:
    """Else they would decide how many run at once, and the others' pages lie idle."""
    costs = costs_of((100,) * (2 * layers), every=2)
    kv_tokens = requests * -(-request_tokens // PAGE_SLOTS) * PAGE_SLOTS
    plan = make_plan(costs, sizes(1 << 40), kv_tokens, chunk, request_tokens)
    pools = PagePools(plan.pages, plan.window_pages, plan.ring_pages)
    assert pools.fit([request_tokens] * requests)
    assert plan.window_pages <= plan.pages


def test_kv_of_65536_tokens_of_a_7b_is_exact() -> None:
    """32 layers x 32 heads x 128 x 2 x 2 bytes x 65536 tokens, over both stages."""
    plan = make_plan(COSTS_7B, [Device("a", 24 * GIB), Device("b", 24 * GIB)], 65536)
    assert plan.kv_bytes == sum(stage.kv_bytes for stage in plan.stages) == 34_359_738_368


def test_stages_cover_the_layers_in_order_on_the_devices_in_order() -> None:
    """A gap or an overlap would compute a different model."""
    devices = [Device("a", 16 * GIB), Device("b", 24 * GIB), Device("c", 16 * GIB)]
    plan = make_plan(COSTS_7B, devices, 4096)
    covered = [layer for stage in plan.stages for layer in stage.layers]
    assert covered == list(range(32))
    assert [stage.device for stage in plan.stages] == devices


def test_uneven_devices_get_uneven_layers() -> None:
    """An even cut is capped by the smallest device: what mixed GPUs suffer from elsewhere."""
    plan = make_plan(COSTS_7B, [Device("big", 36 * GIB), Device("small", 12 * GIB)], 65536)
    first, second = layer_counts(plan)
    assert first > 2 * second


def test_memory_that_is_not_needed_does_not_unbalance_the_work() -> None:
    """A GPU of which another job holds three quarters: the pipeline would be as slow as what the
    other one gets."""
    plan = make_plan(COSTS_7B, [Device("whole", 80 * GIB), Device("rest", 20 * GIB)], 4096)
    assert layer_counts(plan) == [16, 16]


def test_ties_leave_the_extra_layer_to_the_later_stage() -> None:
    """Later chunks of a prompt are dearer, so an extra layer delays less on a late stage."""
    costs = replace(costs_of((100,) * 5), shape=replace(SMALL, layers=5, vocab=0), output_bytes=0)
    assert layer_counts(make_plan(costs, sizes(90_000, 90_000), 16, 1)) == [2, 3]


def test_a_full_device_does_not_unbalance_the_others() -> None:
    """Where one heavy stage sets the largest share, the rest is still spread evenly."""
    costs = costs_of((100, 100, 100, 100, 50_000))
    assert layer_counts(make_plan(costs, sizes(90_000, 90_000, 90_000), 16, 1)) == [2, 2, 1]


def test_kv_is_rounded_up_to_whole_pages() -> None:
    """A stage stores pages: 17 tokens take two."""
    plan = make_plan(costs_of((100,)), sizes(90_000), 17, 1)
    assert (plan.context, plan.kv_tokens, plan.page_slots, plan.pages) == (17, 32, 16, 2)
    assert plan.stages[0].kv_bytes == 32 * 2 * 8 * 2


def test_headroom_is_what_the_parts_leave() -> None:
    """The numbers that `longspan plan` prints must add up."""
    stage = StagePlan(Device("a", 100), range(3), 40, 20, 10, 5)
    assert (stage.total_bytes, stage.headroom_bytes) == (75, 25)


def test_a_context_too_long_is_refused_with_all_numbers() -> None:
    """What is needed, on how many stages, what is free, what fits, what to do."""
    devices = [Device("a", 14 * GIB), Device("b", 14 * GIB)]
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(COSTS_7B, devices, 65536)
    longest = largest_context(COSTS_7B, devices)
    message = str(caught.value)
    assert message.startswith("context of 65536 needs 32.0 GiB of KV on 2 stages, ")
    assert f"the largest that fits is {longest};" in message
    assert "use a shorter context or add a device" in message
    assert caught.value.max_context == longest > 0


def test_memory_that_no_split_can_use_is_explained() -> None:
    """ "needs 1.5 KiB, 1.8 KiB is free" alone reads like a bug."""
    one_page = 16 * 2 * 8 * 2
    costs = costs_of((100,) * 2)
    free = one_page + 400  # one layer each: room for one page and 300 bytes
    last = activation_bytes(SMALL, 1, last=True) - activation_bytes(SMALL, 1, last=False)
    with pytest.raises(DoesNotFitError, match="but no split by whole layers can use all of it"):
        make_plan(costs, sizes(free, 4 * free + last), 32, 1)


def test_weights_that_do_not_fit_name_the_stage_and_what_it_lacks() -> None:
    """No shorter context helps, so none is offered."""
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(costs_of((10, 5 * GIB)), sizes(GIB, GIB), 16, 1)
    message = str(caught.value)
    assert caught.value.max_context == 0
    assert "stage 1 on gpu1 lacks 4.0 GiB" in message
    assert "5.0 GiB for weights" in message
    assert "stage 0" not in message


def test_more_devices_than_layers_are_refused() -> None:
    """A stage without layers has no work."""
    with pytest.raises(ConfigError, match="3 stages.* for 2 layers.*at most 2"):
        make_plan(costs_of((1, 1)), sizes(9000, 9000, 9000), 16)


@pytest.mark.parametrize(
    ("devices", "kv_tokens", "chunk_tokens", "complaint"),
    [
        ([], 16, 1, "no device"),
        ([Device("gpu0", 0)], 16, 1, "gpu0 has 0 bytes free"),
        (sizes(9000), 0, 1, "context of 0 tokens"),
        (sizes(9000), 16, 0, "chunks of 0 tokens"),
    ],
)
def test_impossible_numbers_are_refused(
    devices: list[Device], kv_tokens: int, chunk_tokens: int, complaint: str
) -> None:
    """A zero must not end in a division by zero."""
    with pytest.raises(ConfigError, match=complaint):
        make_plan(costs_of((1,)), devices, kv_tokens, chunk_tokens)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24GB", 24_000_000_000),
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("1000", 1000),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("7kB", 7000),
        ("80B", 80),
        ("1024TiB", 1 << 50),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes_parse(text: str, size: int) -> None:
    """GiB counts by 1024 and GB by 1000; a mix-up is 7% of a GPU."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "nan", "inf", "0", "0.2", "24G", "24 GiB free", "1e9", "1.GiB", ".5GiB",
     "1025TiB", "9" * 5000, "٢٤GiB", "1_000", "24  GiB", "1,5GiB"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    """A size half understood would plan for the wrong device."""
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (34_359_738_368, "32.0 GiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes_print_in_binary_units(n: int, text: str) -> None:
    """ "1024.0 KiB" would be a unit too small."""
    assert format_bytes(n) == text
