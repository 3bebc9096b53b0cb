"""Plans as values: building, both wire forms, refusals that need no model."""

import copy
import hashlib
import json
import pickle
import zlib
from base64 import b64decode, b64encode

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unsafe_routes import ModelShape, RouteError, RoutePlan
from vllm_unsafe_routes.binding import PromptBinding
from vllm_unsafe_routes.compiler import PlanCompiler
from vllm_unsafe_routes.directive import KINDS
from vllm_unsafe_routes.wire import WIRE_PREFIXES

experts = st.lists(st.integers(0, 511), min_size=1, max_size=10, unique=True)
positions = st.one_of(
    st.sampled_from(["prompt", "generated", "all"]), st.lists(st.integers(0, 5000), min_size=1, max_size=6, unique=True)
)


@st.composite
def plans(draw):
    plan = RoutePlan(draw(st.sampled_from(["masked", "native"])), draw(st.sampled_from([None, "0123456789abcdef"])))
    for _ in range(draw(st.integers(0, 6))):
        kind, chosen = draw(st.sampled_from(KINDS)), draw(experts)
        layer, where = draw(st.integers(0, 100)), draw(positions)
        if kind == "force":
            weights = draw(st.none() | st.lists(st.floats(0, 4, width=32), min_size=len(chosen), max_size=len(chosen)))
            plan.force(layer, where, chosen, weights)
        elif kind == "bias":
            plan.bias(layer, where, {expert: draw(st.floats(-9, 9, width=32)) for expert in chosen})
        else:
            getattr(plan, kind)(layer, where, chosen)
    return plan


@given(plans())
@settings(max_examples=200, deadline=None)
def test_both_forms_carry_the_whole_plan(plan):
    for again in (
        RoutePlan.from_string(plan.to_string()),
        RoutePlan.from_json(plan.to_json()),
        RoutePlan.from_string(plan.to_json()),
    ):
        assert again == plan
        assert again.digest == plan.digest
        assert again.directives == plan.directives


@given(plans(), st.permutations(["weights", "model", "directives", "prompt"]), st.integers(1, 255), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_digest_is_taken_over_the_content_however_it_is_written(plan, order, yes, spaced):
    """Another writer's head may have its keys in any order, and say by any byte that a directive has weights."""
    plan = plan.for_prompt([5, 6, 7]) if len(plan) % 2 else plan
    prefix, packed = plan.to_string()[:4], plan.to_string()[4:]
    head, _, body = zlib.decompress(b64decode(packed)).partition(b"\n")
    document = json.loads(head)
    if "prompt" in document:
        document["prompt"] = dict(reversed(document["prompt"].items()))
    head = json.dumps({key: document[key] for key in order if key in document}, separators=None if spaced else (",", ":")).encode()
    body = body[: len(plan)] + body[len(plan) : 2 * len(plan)].replace(b"\1", bytes([yes])) + body[2 * len(plan) :]
    again = RoutePlan.from_string(prefix + b64encode(zlib.compress(head + b"\n" + body)).decode())
    assert (again.digest, again.directives, again.prompt) == (plan.digest, plan.directives, plan.prompt)


def test_a_number_of_directives_is_no_truth():
    packed = RoutePlan().disable(0, "all", [1]).to_string()
    payload = zlib.decompress(b64decode(packed[4:])).replace(b'"directives": 1', b'"directives": true')
    with pytest.raises(RouteError, match="unknown head"):
        RoutePlan.from_string(packed[:4] + b64encode(zlib.compress(payload)).decode())


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: "rp2:" + b64encode(zlib.compress(raw)).decode()))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_not_crashed_on(text):
    with pytest.raises(RouteError):
        RoutePlan.from_string(text)


@pytest.mark.parametrize("cut", [0, 1, 5, 20, -1])
def test_a_damaged_string_is_refused(cut):
    text = RoutePlan().force(1, [3], [1, 2]).disable(0, "all", [5]).to_string()
    with pytest.raises(RouteError, match=r"damaged|cut off|starts with"):
        RoutePlan.from_string(text[:cut])


def test_a_bomb_is_refused_before_it_unpacks():
    bomb = "rp1:" + b64encode(zlib.compress(bytes(200 << 20), 9)).decode()
    with pytest.raises(RouteError, match="larger than"):
        RoutePlan.from_string(bomb)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RoutePlan(weights="sharp"), "weights 'sharp' is not one of masked, native"),
        (lambda: RoutePlan().force(0, [1], [3, 3]), "expert 3 is repeated"),
        (lambda: RoutePlan().force(0, [1, 1], [3]), "a position is repeated"),
        (lambda: RoutePlan().force(0, [], [3]), "positions is empty"),
        (lambda: RoutePlan().disable(0, "all", []), "experts is empty"),
        (lambda: RoutePlan().disable(0, "suffix", [1]), "positions 'suffix' is not a list or one of"),
        (lambda: RoutePlan().disable(-1, "all", [1]), "layer -1 is out of range"),
        (lambda: RoutePlan().disable(True, "all", [1]), "layer must be an integer, got True"),
        (lambda: RoutePlan().disable(0, "all", [1.5]), r"experts\[0\] must be an integer, got 1.5"),
        (lambda: RoutePlan().force(0, [1], [1, 2], weights=[1.0]), "1 weights for 2 experts"),
        (lambda: RoutePlan().force(0, [1], [1], weights=[float("nan")]), "weights must be finite"),
        (lambda: RoutePlan().bias(0, [1], {1: float("nan")}), "values must be finite float32 numbers"),
        (lambda: RoutePlan().bias(0, [1], {1: 1e39}), "values must be finite float32 numbers"),
        (lambda: RoutePlan().bias(0, [1], {}), "experts is empty"),
        (lambda: RoutePlan().bias(0, [1], {1.5: 1.0}), r"experts\[0\] must be an integer, got 1.5"),
        (lambda: RoutePlan().bias(0, [1], [1, 2]), "bias must be an object of expert -> value"),
        (lambda: RoutePlan().promote(0, [1], [3, 3]), "expert 3 is repeated"),
        (lambda: RoutePlan().demote(0, [], [3]), "positions is empty"),
    ],
)
def test_wrong_whatever_the_model(build, message):
    with pytest.raises(RouteError, match=message):
        build()


BIAS = {"layer": 1, "positions": "all"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"version": "route-plan/3"}, "plan version 'route-plan/3' is not 'route-plan/1' or 'route-plan/2'"),
        ({"version": ["route-plan/1"]}, "is not 'route-plan/1' or 'route-plan/2'"),
        (
            {"version": "route-plan/1", "directives": [{"layer": 1, "positions": "all", "promote": [1]}]},
            "directive 0 has unknown keys promote; known are allow, disable, force",
        ),
        ({"version": "route-plan/2", "directives": [BIAS | {"bias": [1]}]}, "bias must be an object of expert -> value"),
        ({"version": "route-plan/2", "directives": [BIAS | {"bias": {"x": 1}}]}, "bias has 'x', which is not an expert"),
        ({"version": "route-plan/2", "directives": [BIAS | {"bias": {"1": "x"}}]}, "values must be a list of numbers"),
        ({"version": "route-plan/2", "directives": [BIAS | {"bias": {"1": 1, "01": 2}}]}, "expert 1 is repeated"),
        ({"version": "route-plan/2", "directives": [BIAS | {"bias": {"1": 1}, "weights": [1]}]}, "weights are for force only"),
        ({"version": "route-plan/2", "directives": [BIAS | {"bias": {"1": 1}, "demote": [2]}]}, "needs exactly one of"),
        ({"version": "route-plan/1", "extra": 1}, "plan has unknown keys extra"),
        ({"version": "route-plan/1", "directives": [{"layer": 1, "positions": "all"}]}, "needs exactly one of"),
        ({"version": "route-plan/1", "directives": [{"layer": 1, "force": [1]}]}, "directive 0 lacks 'positions'"),
        (
            {"version": "route-plan/1", "directives": [{"layer": 1, "positions": "all", "disable": [1], "expert": 2}]},
            "directive 0 has unknown keys expert",
        ),
        ({"version": "route-plan/1", "directives": {}}, "directives must be a list"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_json(document, message):
    with pytest.raises(RouteError, match=message):
        RoutePlan.from_json(json.dumps(document))


def test_a_plan_travels_in_the_first_version_that_says_it():
    plan = RoutePlan().disable(0, "all", [1])
    assert plan.to_string().startswith("rp1:") and json.loads(plan.to_json())["version"] == "route-plan/1"
    plan.bias(1, [3], {5: -2.5, 4: 1})
    assert plan.to_string().startswith("rp2:") and json.loads(plan.to_json())["version"] == "route-plan/2"
    assert json.loads(plan.to_json())["directives"][1] == {"layer": 1, "positions": [3], "bias": {"5": -2.5, "4": 1.0}}
    with pytest.raises(RouteError, match="unknown directive kind"):
        RoutePlan.from_string("rp1:" + plan.to_string()[4:])
    assert set(WIRE_PREFIXES) == {"rp1:", "rp2:"}


def test_a_plan_of_a_whole_prompt_stays_small():
    plan = RoutePlan()
    for layer in range(26):
        for position in range(48):
            plan.force(layer, [position], [(layer * 7 + position * 5 + k * 11) % 64 for k in range(6)])
    assert len(plan.to_string()) < 20_000


@pytest.mark.parametrize(("name", "value"), [("model", "feedfacefeedface"), ("weights", "native"), ("weights", "sharp")])
def test_a_plan_is_built_with_its_mode_and_model(name, value):
    plan = RoutePlan().force(1, [3], [1, 2])
    text, digest = plan.to_string(), plan.digest
    with pytest.raises(AttributeError):
        setattr(plan, name, value)
    assert (plan.to_string(), plan.digest) == (text, digest)


def test_string_and_digest_follow_every_directive():
    plan = RoutePlan()
    seen = set()
    for layer in range(4):
        again = RoutePlan.from_string(plan.to_string())
        assert again.digest == plan.digest and again == plan
        seen.add((plan.to_string(), plan.digest))
        assert plan.disable(layer, "all", [1]) is plan
    assert len(seen) == 4


def test_what_can_change_has_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(RoutePlan())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_is_a_plan_of_its_own(copied):
    plan = RoutePlan("native", "feedfacefeedface").force(1, [3], [1, 2])
    text = plan.to_string()
    other = copied(plan)
    assert other == plan and other.to_string() == text
    other.disable(0, "all", [5])
    assert plan.to_string() == text == RoutePlan("native", "feedfacefeedface").force(1, [3], [1, 2]).to_string()
    assert other != plan and RoutePlan.from_string(other.to_string()) == other


class TestBinding:
    """A plan that is meant for one prompt is refused for another."""

    IDS = (5, 6, 7, 8)

    def test_it_travels_with_the_plan(self):
        plan = RoutePlan(model="feedfacefeedface").for_prompt(self.IDS).force(1, [3], [1, 2])
        binding = PromptBinding(4, hashlib.sha256(np.array(self.IDS, "<i4").tobytes()).hexdigest()[:32])
        for again in (plan, RoutePlan.from_string(plan.to_string()), RoutePlan.from_json(plan.to_json()), plan.copy()):
            assert (again.prompt, again.model, again.digest) == (binding, plan.model, plan.digest)
        assert json.loads(plan.to_json())["prompt"] == {"tokens": 4, "digest": binding.digest}
        shape = ModelShape("olmoe", 2, 64, (0, 1), num_experts=8, top_k=2)
        compiler = PlanCompiler(shape)
        unnamed = RoutePlan().for_prompt(self.IDS).force(1, [3], [1, 2])
        for delta in ((), (0, 1, 4, 5)):
            assert compiler.compile_text(unnamed.to_string(), delta).prompt == binding

    def test_binding_makes_another_plan_and_leaves_the_old_one(self):
        plan = RoutePlan().force(1, [3], [1, 2])
        text = plan.to_string()
        bound = plan.for_prompt(self.IDS)
        assert plan.prompt is None and plan.to_string() == text
        assert len({plan.digest, bound.digest, plan.for_prompt([5, 6, 7, 9]).digest}) == 3
        assert bound.for_prompt([1]).prompt.tokens == 1

    def test_a_plan_without_one_reads_as_it_always_did(self):
        assert "prompt" not in json.loads(RoutePlan().disable(0, "all", [1]).to_json())
        assert RoutePlan().disable(0, "all", [1]).digest == "87e763ed2ed217a8bac7beb6bcffcc75"

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([5, 6, 7], "the plan is for a prompt of 4 tokens, this one has 3"),
            ([1, 5, 6, 7, 8], "the plan is for a prompt of 4 tokens, this one has 5"),
            ([5, 6, 7, 9], "the plan is for the prompt with digest [0-9a-f]{32}, this one of 4 tokens has [0-9a-f]{32}"),
            (None, "the plan is for a prompt of 4 token ids, this one has embeddings"),
        ],
    )
    def test_another_prompt_is_refused(self, ids, message):
        binding = RoutePlan().for_prompt(self.IDS).prompt
        binding.check(list(self.IDS))
        with pytest.raises(RouteError, match=message) as caught:
            binding.check(ids)
        assert caught.value.reason == "prompt"

    @pytest.mark.parametrize(
        "document",
        [
            *({}, {"tokens": 4}, {"tokens": 4, "digest": 7}, {"tokens": 4, "digest": "xyz"}, [], "x"),
            *({"tokens": -1, "digest": "0" * 32}, {"tokens": True, "digest": "0" * 32}),
            {"tokens": 4, "digest": "0" * 32, "speed": 1},
        ],
    )
    def test_a_damaged_binding(self, document):
        with pytest.raises(RouteError, match="plan prompt"):
            RoutePlan.from_json({"version": "route-plan/1", "directives": [], "prompt": document})
