"""Plans against a model: refusals with field, value and limit; rows, blocks, cache keys and counts."""

import gc
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vllm_unsafe_routes import LayerPolicy, ModelShape, RouteError, RoutePlan, RoutePolicy
from vllm_unsafe_routes.compiled import NO_ROW, RowLayout, expert_bits
from vllm_unsafe_routes.compiler import PlanCompiler

SHAPE = ModelShape("olmoe", 6, 64, (1, 2, 4), num_experts=64, top_k=4)
POLICY = RoutePolicy({1: LayerPolicy(disabled=frozenset({7}), protected=frozenset({3})), 4: LayerPolicy(frozenset(range(59)))})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RoutePlan().disable(3, "all", [1]), "layer 3 has no experts; MoE layers are 1, 2, 4"),
        (
            RoutePlan().force(2, [17], [1, 2, 3, 64]),
            r"layer 2, position 17: expert 64 is out of range for 64 experts \(0-63\)",
        ),
        (RoutePlan().force(2, [17], [1, 2, 3]), "layer 2, position 17: 3 forced experts, exactly top_k 4 are needed"),
        (RoutePlan().force(2, [1], [1, 2, 3, 4]).force(2, [0, 1], [5, 6, 7, 8]), "layer 2, position 1: two forces"),
        (RoutePlan().force(2, "all", [1, 2, 3, 4]).force(2, [9], [5, 6, 7, 8]), "layer 2, position 9: two forces"),
        (
            RoutePlan().force(2, "all", [1, 2, 3, 4]).force(2, "prompt", [5, 6, 7, 8]),
            "layer 2, positions 'prompt': two",
        ),
        (RoutePlan().allow(2, [3], [1, 2, 3]), "layer 2, position 3: 3 experts left, top_k 4 are needed"),
        (RoutePlan().disable(2, "generated", list(range(61))), "positions 'generated': 3 experts left"),
        (
            RoutePlan().force(2, [3], [1, 2, 3, 4]).disable(2, "all", [2]),
            "expert 2 is forced and disabled by the same plan",
        ),
        (RoutePlan(model="feedfacefeedface").disable(2, "all", [1]), "the plan is for model feedfacefeedface"),
        (RoutePlan().bias(2, [17], {64: 1.0}), r"layer 2, position 17: expert 64 is out of range for 64 experts \(0-63\)"),
        (
            RoutePlan().promote(2, "all", [1, 2]).promote(2, [9], [3, 4]),
            "layer 2, position 9: 4 promoted experts, fewer than top_k 4 can be; use force",
        ),
        (RoutePlan().promote(2, "all", [5]).demote(2, [9], [5]), "position 9: expert 5 is promoted and demoted by the same plan"),
        (RoutePlan().promote(2, [9], [5]).disable(2, "all", [5]), "position 9: expert 5 is promoted and disabled by the same plan"),
    ],
    ids=lambda value: "" if isinstance(value, RoutePlan) else value[:40],
)
def test_refusals(plan, message):
    with pytest.raises(RouteError, match=message):
        PlanCompiler(SHAPE).compile(plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RoutePlan().force(1, [0], [3, 7, 8, 9]), "layer 1, position 0: expert 7 is disabled by the engine's policy"),
        (RoutePlan().force(1, [0], [4, 6, 8, 9]), "layer 1, position 0: expert 3 is protected by the engine's policy"),
        (RoutePlan().disable(1, "all", [3]), "expert 3 is protected by the engine's policy and cannot be excluded"),
        (RoutePlan().allow(1, "all", [4, 5, 6, 8]), "expert 3 is protected"),
        (RoutePlan().disable(4, "all", [60, 61]), "layer 4, positions 'prompt': 3 experts left, top_k 4"),
        (
            RoutePlan().promote(1, [0], [7]),
            "layer 1, position 0: expert 7 is disabled by the engine's policy and cannot be promoted",
        ),
        (
            RoutePlan().demote(1, [0], [3]),
            "layer 1, position 0: expert 3 is protected by the engine's policy and cannot be demoted",
        ),
        (RoutePlan().bias(1, [0], {3: -0.5}), "expert 3 is protected by the engine's policy and cannot be demoted"),
        (RoutePlan().bias(1, [0], {5: 0.5}), "expert 3 is protected .* and expert 5 cannot be raised above it"),
        (RoutePlan().promote(1, [0], [5]), "expert 3 is protected .* and expert 5 cannot be raised above it"),
    ],
)
def test_a_plan_cannot_lift_the_policy(plan, message):
    with pytest.raises(RouteError, match=message):
        PlanCompiler(SHAPE, POLICY).compile(plan)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RoutePolicy({0: LayerPolicy(frozenset({1}))}), "policy layer 0 has no experts; MoE layers are 1, 2, 4"),
        (RoutePolicy({1: LayerPolicy(frozenset({64}))}), r"expert 64 is out of range for 64 experts \(0-63\)"),
        (RoutePolicy({1: LayerPolicy(frozenset(range(61)))}), "3 experts left, top_k 4 are needed"),
        (RoutePolicy({1: LayerPolicy(protected=frozenset(range(5)))}), "5 protected experts, at most top_k 4"),
        (RoutePolicy({1: LayerPolicy(bias={64: 1.0})}), r"expert 64 is out of range for 64 experts \(0-63\)"),
        (RoutePolicy({}, model="0" * 16), "the policy is for model 0000000000000000"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(policy, message):
    with pytest.raises(RouteError, match=message):
        PlanCompiler(SHAPE, policy)


@pytest.mark.parametrize(
    "plan",
    [
        RoutePlan().demote(1, "all", [5, 7]).bias(1, [0], {6: -1.0, 7: 2.0 - 3.0}),
        RoutePlan().promote(1, "all", [3]).bias(1, [0], {3: 1.0}),
        RoutePlan().bias(1, "all", {3: 0.0}),
    ],
    ids=["lowers others", "raises the protected one", "nothing"],
)
def test_a_soft_plan_that_the_policy_permits(plan):
    assert PlanCompiler(SHAPE, POLICY).compile(plan).digest == plan.digest


BIASED = RoutePolicy({1: LayerPolicy({7}, {3}, {3: 0.5, 5: -2.0, 63: 1.0}), 4: LayerPolicy(bias={0: 1.5})}, "native")


def bias_of(row):
    """Flags and the bias of a row, by expert."""
    flags, *_, bias = RowLayout(64, 4).columns(RowLayout(64, 4).table([row]))
    return int(flags[0]), {expert: value for expert, value in enumerate(bias[0].tolist()) if value}


def test_a_policy_s_bias_is_in_the_row_of_every_token_that_no_plan_forces():
    compiler = PlanCompiler(SHAPE, BIASED)
    first, second, third = compiler.policy_rows()
    assert (bias_of(first), second, bias_of(third)) == ((12, {3: 0.5, 5: -2.0, 63: 1.0}), None, (12, {0: 1.5}))
    plan = RoutePlan().bias(1, [0], {3: 0.25, 9: -1.0}).disable(1, [1], [63]).demote(1, [2], [0]).force(1, [3], [1, 2, 3, 4])
    made = compiler.compile(plan.disable(4, [0], [0]).disable(2, [0], [0]))
    rows = [None if row == NO_ROW else made.rows[row] for row in made.block[:, :4].ravel()]
    assert bias_of(rows[0]) == (8, {3: 0.75, 5: -2.0, 9: -1.0, 63: 1.0})  # weights are as the plan says
    assert bias_of(rows[1]) == (8, {3: 0.5, 5: -2.0})
    assert bias_of(rows[2]) == (24, {3: 0.5, 5: -2.0, 63: 1.0})
    assert rows[3] == PlanCompiler(SHAPE).compile(RoutePlan().force(1, [3], [1, 2, 3, 4])).rows[0]
    assert rows[4] == PlanCompiler(SHAPE).compile(RoutePlan().disable(2, [0], [0])).rows[0]
    assert rows[8] == PlanCompiler(SHAPE).compile(RoutePlan().disable(4, [0], [0])).rows[0]
    assert made.block[2, 1] == NO_ROW  # the policy's row holds there
    outweighed = compiler.compile(RoutePlan().bias(4, [0], {0: -1.5, 1: 2.0}))
    assert bias_of(outweighed.rows[0]) == (8, {1: 2.0})
    delta = compiler.compile_text(plan.to_string(), (1, 0, 1, 2, 3, 4))
    assert delta.rows[delta.block[0, 0]] == rows[3]


def test_a_bias_that_asks_for_what_a_policy_forbids_is_refused_as_ever():
    with pytest.raises(RouteError, match="expert 3 is protected by the engine's policy and cannot be demoted"):
        PlanCompiler(SHAPE, BIASED).compile(RoutePlan().bias(1, [0], {3: -0.1}))


def test_soft_rows():
    """Biases add up, what excludes nothing else is kept beside a mask, and a force decides alone."""
    plan = (
        RoutePlan()
        .bias(1, "all", {5: 0.5, 63: -2.0})
        .bias(1, [0], {5: -0.5, 6: 1.5, 9: 4.0})
        .disable(1, [0], [9])
        .promote(1, [1], [40])
        .demote(1, [1], [2])
        .force(1, [2], [1, 2, 3, 4])
        .bias(2, "all", {1: 0.0})
    )
    compiled = PlanCompiler(SHAPE).compile(plan)
    assert (compiled.block[1] == NO_ROW).all()
    layout = RowLayout(64, 4)
    flags, allowed, _, _, steered, bias = layout.columns(layout.table([compiled.rows[row] for row in compiled.block[0]]))
    assert flags.tolist() == [8, 24, 1, 8, 8]
    everything = 0xFFFFFFFF
    assert allowed.view("<u4").tolist()[:2] == [[everything & ~(1 << 9), everything], [everything, everything]]
    assert steered.tolist()[1] == [0, 1 << 8, 1 << 2, 0] and not steered[[0, 2, 3]].any()
    expected = np.zeros((5, 64), np.float32)
    expected[0, [6, 63]], expected[[1, 3, 4], 5], expected[[1, 3, 4], 63] = [1.5, -2.0], 0.5, -2.0
    assert bias.tolist() == expected.tolist()
    forced = PlanCompiler(SHAPE).compile(RoutePlan().force(1, [2], [1, 2, 3, 4]))
    assert compiled.rows[compiled.block[0, 2]] == forced.rows[0]


def test_a_delta_forces_over_soft_directives():
    base = RoutePlan().promote(1, "all", [40]).bias(2, "all", {1: 1.0}).to_string()
    compiled = PlanCompiler(SHAPE).compile_text(base, (1, 0, 1, 2, 3, 4, 2, 0, 1, 2, 3, 4))
    forced = RowLayout(64, 4).forced_row((1, 2, 3, 4), None, False, 0b11110)
    assert [compiled.rows[row] for row in compiled.block[:2, 0]] == [forced, forced]


def test_limits_of_the_table_are_named():
    plan = RoutePlan()
    for position in range(20):
        plan.force(1, [position], [position, 40, 41, 42])
    with pytest.raises(RouteError, match="20 distinct routes, more than the 19 that the route table holds"):
        PlanCompiler(SHAPE, max_rows=19).compile(plan)
    with pytest.raises(RouteError, match="20 positions x 3 MoE layers = 66 cells, more than the route table's 65"):
        PlanCompiler(SHAPE, max_cells=65).compile(plan)


def test_candidates_share_all_rows_but_one():
    compiler = PlanCompiler(SHAPE)
    base = [(layer, position, [position % 60, 61, 62, 63]) for layer in SHAPE.moe_layers for position in range(10)]
    contents: set[bytes] = set()
    for candidate in range(8):
        plan = RoutePlan()
        for layer, position, chosen in base:
            plan.force(layer, [position], chosen)
        plan.force(2, [10], [candidate, candidate + 8, 50, 51])
        contents |= set(compiler.compile(plan).rows)
    assert len(contents) == 10 + 8


def test_block_layout():
    plan = RoutePlan().disable(1, "prompt", [5]).force(2, [1], [4, 3, 2, 1]).allow(4, "generated", [1, 2, 3, 4, 9])
    compiled = PlanCompiler(SHAPE).compile(plan)
    masked, forced, allowed = compiled.block[0, 0], compiled.block[1, 1], compiled.block[2, 3]
    expected = [[masked, masked, masked, NO_ROW], [NO_ROW, forced, NO_ROW, NO_ROW], [NO_ROW, NO_ROW, NO_ROW, allowed]]
    assert compiled.block.tolist() == expected
    assert len({masked, forced, allowed}) == 3
    flags, words = np.frombuffer(compiled.rows[masked], "<i4")[:1], np.frombuffer(compiled.rows[masked], "<u4")[1:3]
    assert flags[0] == 0
    assert words.tolist() == [0xFFFFFFFF & ~(1 << 5), 0xFFFFFFFF]
    assert np.frombuffer(compiled.rows[forced], "<i4")[3:7].tolist() == [4, 3, 2, 1]


def test_listed_steps_have_the_mask_of_generated_tokens_and_what_is_between_them_too():
    plan = (
        RoutePlan().for_prompt([7, 8]).disable(1, "prompt", [5]).disable(1, "generated", [6]).disable(1, ("generated", 1, 2), [9])
    )
    compiled = PlanCompiler(SHAPE).compile(plan)
    banned = [
        [expert for expert in range(64) if not np.frombuffer(compiled.rows[row], "<u4")[1 + expert // 32] >> (expert % 32) & 1]
        for row in compiled.block[0]
    ]
    # Positions 0 and 1 of the prompt, steps 0 and 1, other prompt tokens, other steps.
    assert banned == [[5], [5], [6], [6, 9], [5], [6]]


@pytest.mark.parametrize("bound", [False, True], ids=["", "bound"])
def test_counts_and_keys_against_a_loop(bound):
    rng = random.Random(5)
    for _ in range(60):
        prompt_len = rng.randrange(12, 20)
        plan, other = (RoutePlan().for_prompt(range(prompt_len)) if bound else RoutePlan() for _ in range(2))
        for layer in SHAPE.moe_layers:
            for _ in range(rng.randrange(3)):
                where = rng.choice(
                    ["prompt", "generated", "all", [rng.randrange(12)], [0, 3, 7], ("generated", 1, rng.randrange(2, 9))]
                )
                if isinstance(where, tuple) and not bound:
                    continue
                banned = rng.sample(range(64), 2)
                plan.disable(layer, where, banned)
                if rng.random() < 0.8:
                    other.disable(layer, where, banned)
        compiler = PlanCompiler(SHAPE)
        first, second = compiler.compile(plan), compiler.compile(other)
        start = rng.randrange(24)
        end = start + rng.randrange(1, 12)

        def effect(compiled, position, prompt_len=prompt_len):
            column = compiled.block[:, compiled.column(position, prompt_len)]
            return [None if row == NO_ROW else compiled.rows[row] for row in column]

        span = range(start, end)
        count = sum(row is not None for position in span for row in effect(first, position))
        assert first.num_routes(start, end, prompt_len) == count
        same = all(effect(first, position) == effect(second, position) for position in span)
        assert (first.cache_key(start, end, prompt_len) == second.cache_key(start, end, prompt_len)) == same
        assert (first.cache_key(start, end, prompt_len) is None) == (count == 0)


def test_threads_share_a_compiler(monkeypatch):
    """An engine core's two threads look plans up in one compiler while old results make room for new ones."""
    monkeypatch.setattr("vllm_unsafe_routes.compiler._REMEMBERED_PLANS", 2)
    compiler = PlanCompiler(SHAPE)
    texts = [RoutePlan().disable(2, "all", [expert]).to_string() for expert in range(8)]
    deltas = [(2, position, 8, 9, 10, 11) for position in range(4)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            text, delta = rng.choice(texts), rng.choice(deltas)
            assert compiler.compile_text(text, delta).num_listed == delta[1] + 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()
    assert compiler._memory.num_bytes == sum(one.num_bytes for one in compiler._memory.plans.values())


def test_what_is_remembered_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr("vllm_unsafe_routes.compiler._REMEMBERED_BYTES", 1 << 20)
    compiler = PlanCompiler(SHAPE)
    for position in range(0, 3000, 25):
        compiler.compile_text(RoutePlan().force(2, [position], range(4)).to_string(), (4, position, 8, 9, 10, 11))
        kept = list(compiler._memory.plans.values())
        assert compiler._memory.num_bytes == sum(one.num_bytes for one in kept) <= 1 << 20
    assert len(kept) >= 2


def test_the_text_of_a_plan_is_not_kept():
    """120 plans, each one directive padded with blanks to 2 MB: a cache that is keyed by text would hold 244 MiB."""
    compiler = PlanCompiler(SHAPE)
    documents = [RoutePlan().disable(2, [at], [expert]).to_json() for at in range(15) for expert in range(8)]
    compiler.compile_text(documents[0])
    gc.collect()
    tracemalloc.start()
    try:
        for document in documents:
            compiler.compile_text(document + " " * (2 << 20))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 << 20, f"{held >> 20} MiB"
    assert len(compiler._memory.plans) == 121


@pytest.mark.parametrize("form", ["string", "json", "bytes"])
def test_one_limit_for_every_form(form, monkeypatch):
    monkeypatch.setattr("vllm_unsafe_routes.wire.MAX_WIRE_BYTES", 5000)
    plan = RoutePlan()
    for position in range(600):
        plan.disable(2, [position], [1])
    read = {
        "string": lambda: RoutePlan.from_string(plan.to_string()),
        "json": lambda: RoutePlan.from_string(plan.to_json()),
        "bytes": lambda: RoutePlan.from_json(plan.to_json().encode()),
    }[form]
    with pytest.raises(RouteError, match="larger than 5000 bytes"):
        read()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("num_experts", [8, 64, 100])
def test_rows_made_together_are_those_made_one_by_one(num_experts, native):
    layout = RowLayout(num_experts, 4)
    orders = np.stack([np.random.default_rng(seed).permutation(num_experts) for seed in range(20)]).astype(np.int32)
    expected = [layout.forced_row(tuple(row), None, native, expert_bits(row)) for row in orders[:, :4].tolist()]
    assert [row.tobytes() for row in layout.rows_of(orders[:, :4], native, chooses=False)] == expected
    expected = [layout.mask_row(expert_bits(row), native) for row in orders[:, :7].tolist()]
    assert [row.tobytes() for row in layout.rows_of(orders[:, :7], native, chooses=True)] == expected
