"""Who takes part in kernel_speed.py: the directed kernel in its uses, and what engines and torch offer for the same gating."""

from __future__ import annotations

import functools
import importlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm_unsafe_routes.kernels import GatingSpec, RouteRows, pack_allowed, route_topk, route_topk_reference
from vllm_unsafe_routes.kernels.spec import FLAG_FORCED

# Rows of the route table, as many as a busy batch may have.
NUM_ROWS = 256
# Both sides may be 4e-6 off, see docs/kernels.md.
OURS_TOLERANCE = 8e-6
# Peers work in float32 with the fast exponential.
PEER_TOLERANCE = 1e-4
# Where scores are computed, two right answers may differ at a near tie: this share of the tokens may choose otherwise.
NEAR_TIES = 1e-4
UNTOUCHED = -5

Routes = tuple[torch.Tensor, torch.Tensor]


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's gating.

    Attributes:
        name: the model, for tables.
        spec: its gating.
        correction_bias: whether a bias steers the selection.

    """

    name: str
    spec: GatingSpec
    correction_bias: bool = False

    @property
    def label(self) -> str:
        """Name, experts and top k."""
        return f"{self.name} {self.spec.num_experts}/{self.spec.top_k}"


# One of each kind that public models use; compile_table.py compiles for them, too.
SHAPES = (
    Shape("Mixtral", GatingSpec(8, 2, renormalize=True)),
    Shape("OLMoE", GatingSpec(64, 8)),
    Shape("Qwen1.5-MoE", GatingSpec(60, 4)),
    Shape("DeepSeek-V2-Lite", GatingSpec(64, 6)),
    Shape("Qwen3-30B", GatingSpec(128, 8, renormalize=True)),
    Shape("DeepSeek-V3", GatingSpec(256, 8, "sigmoid", True, 2.5, 8, 4, "top2"), correction_bias=True),
    Shape("Kimi-K2", GatingSpec(384, 8, "sigmoid", True, 2.827), correction_bias=True),
    Shape("Qwen3-Next", GatingSpec(512, 10, renormalize=True)),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Inputs of one comparison, in slots that launches take in turn so that none finds its input in a cache.

    Attributes:
        shape: the model's gating.
        logits: bfloat16 [slots, num_tokens, num_experts].
        correction_bias: float32 [num_experts] or None.
        rows: masks, then forced ids, half of the table each.
        row_index: int32 [num_tokens] by use: "none", "masked", "forced".

    """

    shape: Shape
    logits: torch.Tensor
    correction_bias: torch.Tensor | None
    rows: RouteRows
    row_index: dict[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens of one launch."""
        return int(self.logits.shape[1])


@dataclass(frozen=True, slots=True)
class Contestant:
    """One line of the comparison.

    Attributes:
        name: for tables.
        applies: whether it does this gating at all.
        prepare: makes the call for a problem: slot -> weights and ids; raises Unavailable.
        directive: the use of directives: None (no table), "none", "masked" or "forced".
        rewrites: whether it has nothing to do but for routes that another kernel left.
        keeps: whether it also copies the routes to buffers of their own.
        tolerance: of its weights.
        exact_ids: whether equal scores must go to the smaller id, in order.

    """

    name: str
    applies: Callable[[GatingSpec], bool]
    prepare: Callable[[Problem], Callable[[int], Routes]]
    directive: str | None = None
    rewrites: bool = False
    keeps: bool = False
    tolerance: float = PEER_TOLERANCE
    exact_ids: bool = False


def make_problem(shape: Shape, num_tokens: int, num_slots: int, device: str) -> Problem:
    """Random logits, a table of masks that leave half of the experts and of forced ids, and who has which row."""
    experts, top_k = shape.spec.num_experts, shape.spec.top_k
    generator = torch.Generator(device).manual_seed(0)
    rng = random.Random(0)
    logits = _slots(num_slots, num_tokens, experts, torch.bfloat16, device)
    for slot in logits:
        slot.copy_(torch.randn(num_tokens, experts, generator=generator, device=device))
    bias = torch.randn(experts, generator=generator, device=device) * 0.1 if shape.correction_bias else None
    allowed = torch.zeros(NUM_ROWS, experts, dtype=torch.bool)
    forced_ids = torch.zeros(NUM_ROWS, top_k, dtype=torch.int32)
    flags = torch.zeros(NUM_ROWS, dtype=torch.int32)
    for row in range(NUM_ROWS):
        allowed[row, rng.sample(range(experts), max(top_k, experts // 2))] = True
        forced_ids[row] = torch.tensor(rng.sample(range(experts), top_k))
    flags[NUM_ROWS // 2 :] = FLAG_FORCED
    rows = RouteRows(flags, pack_allowed(allowed), forced_ids, torch.zeros(NUM_ROWS, top_k))
    of_token = torch.arange(num_tokens, dtype=torch.int32) % (NUM_ROWS // 2)
    row_index = {"none": torch.full_like(of_token, -1), "masked": of_token, "forced": of_token + NUM_ROWS // 2}
    on_device = RouteRows(*(None if tensor is None else tensor.to(device) for tensor in rows))
    return Problem(shape, logits, bias, on_device, {use: index.to(device) for use, index in row_index.items()})


def bytes_per_launch(problem: Problem, contestant: Contestant) -> int:
    """What a launch must move: logits, weights and ids, and each token's row once."""
    experts, top_k = problem.shape.spec.num_experts, problem.shape.spec.top_k
    if contestant.rewrites:
        return problem.num_tokens * (4 + (16 * top_k if contestant.keeps else 0))
    of_token = experts * problem.logits.element_size() + 8 * top_k
    if contestant.directive is not None:
        of_token += 4
    if contestant.directive in ("masked", "forced"):
        of_token += 4 + 4 * ((experts + 31) // 32) + 4 * top_k
    if contestant.keeps:
        of_token += 8 * top_k
    return int(problem.num_tokens * of_token)


def check(problem: Problem, contestant: Contestant, call: Callable[[int], Routes]) -> None:
    """Compare slot 0 with the reference.

    Raises:
        AssertionError: the contestant is wrong, so its time means nothing.

    """
    weights, ids = call(0)
    logits, spec = problem.logits[0], problem.shape.spec
    if contestant.rewrites:
        assert (ids == UNTOUCHED).all() and (weights == UNTOUCHED).all(), f"{contestant.name} touched tokens without a directive"
        return
    row_index = None if contestant.directive is None else problem.row_index[contestant.directive]
    rows = None if row_index is None else problem.rows
    expected, expected_ids = route_topk_reference(logits, row_index, rows, spec, correction_bias=problem.correction_bias)
    ids = ids.long()
    assert ids.min() >= 0 and ids.max() < spec.num_experts, f"{contestant.name}: ids out of range"
    if contestant.exact_ids and (problem.correction_bias is None or contestant.directive == "forced"):
        assert torch.equal(ids, expected_ids.long()), f"{contestant.name}: ids differ from the reference"
        right = torch.ones_like(ids[:, 0], dtype=torch.bool)
    else:
        # Another order of equal scores is right too: the chosen scores must agree, not the ids.
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all(), f"{contestant.name}: an expert is chosen twice"
        scores = logits.float() if problem.correction_bias is None else logits.float().sigmoid() + problem.correction_bias
        found = scores.gather(1, ids).sort(-1).values
        right = (found - scores.gather(1, expected_ids.long()).sort(-1).values).abs().amax(-1) <= 1e-6
        tolerated = 0 if problem.correction_bias is None else math.ceil(NEAR_TIES * problem.num_tokens)
        assert (~right).sum() <= tolerated, f"{contestant.name}: {int((~right).sum())} of {problem.num_tokens} tokens are wrong"
        weights, expected = weights.float().sort(-1).values, expected.sort(-1).values
    difference = (weights.float() - expected)[right].abs()
    assert (difference <= contestant.tolerance).all(), f"{contestant.name}: weights differ by up to {float(difference.max())}"


def _slots(num_slots: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """[num_slots, num_tokens, width] whose slots begin at aligned addresses, as tensors of their own would."""
    size = num_tokens * width
    storage = torch.empty(num_slots, (size + 127) // 128 * 128, dtype=dtype, device=device)
    slots: torch.Tensor = storage[:, :size].unflatten(1, (num_tokens, width))
    return slots


def _outputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    (slots, tokens), top_k, device = problem.logits.shape[:2], problem.shape.spec.top_k, problem.logits.device
    made = [_slots(slots, tokens, top_k, dtype, device).fill_(UNTOUCHED) for dtype in (torch.float32, torch.int32)]
    return made[0], made[1]


def _ours(problem: Problem, directive: str | None, rewrites: bool = False, keeps: bool = False) -> Callable[[int], Routes]:
    weights, ids = _outputs(problem)
    kept_weights, kept_ids = _outputs(problem) if keeps else (None, None)
    row_index = None if directive is None else problem.row_index[directive]
    rows = None if directive is None else problem.rows

    def call(slot: int) -> Routes:
        found: Routes = route_topk(
            problem.logits[slot],
            row_index,
            rows,
            problem.shape.spec,
            correction_bias=problem.correction_bias,
            topk_weights=weights[slot],
            topk_ids=ids[slot],
            only_directed=rewrites,
            routes_ids=None if kept_ids is None else kept_ids[slot],
            routes_weights=None if kept_weights is None else kept_weights[slot],
        )
        return found

    return call


def torch_gating(logits: torch.Tensor, spec: GatingSpec, correction_bias: torch.Tensor | None) -> Routes:
    """The gating as one writes it in torch."""
    x = logits.float()
    scores = x.sigmoid() if spec.scoring == "sigmoid" else x.softmax(-1)
    choice = scores if correction_bias is None else scores + correction_bias
    if spec.grouped:
        groups = choice.unflatten(1, (spec.num_expert_group, -1))
        group_scores = groups.topk(2, dim=-1).values.sum(-1) if spec.group_score == "top2" else groups.amax(-1)
        best = group_scores.topk(spec.topk_group, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        choice = groups.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(1)
    ids = choice.topk(spec.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * spec.routed_scaling_factor, ids.to(torch.int32)


@functools.cache
def _vllm_ops() -> Any:
    """vLLM's native MoE operators."""
    if not torch.cuda.is_available():
        raise Unavailable("no GPU")
    reasons = []
    for module in ("vllm._moe_C_stable_libtorch", "vllm._moe_C"):
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            reasons.append(str(error).splitlines()[0])
        else:
            return torch.ops._moe_C
    raise Unavailable("; ".join(reasons))


def _vllm_topk(problem: Problem, name: str) -> Callable[[int], Routes]:
    operator = getattr(_vllm_ops(), name)
    spec = problem.shape.spec
    weights, ids = _outputs(problem)
    scratch = torch.empty_like(ids[0])
    tail: tuple[Any, ...] = (None,) if name == "topk_softmax" else (problem.correction_bias, spec.routed_scaling_factor)

    def call(slot: int) -> Routes:
        operator(weights[slot], ids[slot], scratch, problem.logits[slot], spec.renormalize, *tail, None)
        return weights[slot], ids[slot]

    return call


def _vllm_grouped(problem: Problem) -> Callable[[int], Routes]:
    operator = _vllm_ops().grouped_topk
    spec = problem.shape.spec

    def call(slot: int) -> Routes:
        found: Routes = operator(
            problem.logits[slot],
            spec.num_expert_group,
            spec.topk_group,
            spec.top_k,
            spec.renormalize,
            spec.routed_scaling_factor,
            problem.correction_bias,
            1,
        )
        return found

    return call


def _any(spec: GatingSpec) -> bool:
    return True


CONTESTANTS = (
    Contestant("ours, no table", _any, lambda p: _ours(p, None), tolerance=OURS_TOLERANCE, exact_ids=True),
    Contestant("ours, no directed token", _any, lambda p: _ours(p, "none"), "none", tolerance=OURS_TOLERANCE, exact_ids=True),
    Contestant("ours, all masked", _any, lambda p: _ours(p, "masked"), "masked", tolerance=OURS_TOLERANCE, exact_ids=True),
    Contestant("ours, all forced", _any, lambda p: _ours(p, "forced"), "forced", tolerance=OURS_TOLERANCE, exact_ids=True),
    Contestant("ours behind native, no directed token", _any, lambda p: _ours(p, "none", True), "none", rewrites=True),
    # What an engine with overrides launches: it keeps the routes for whoever asks for them.
    Contestant("ours behind native, routes kept", _any, lambda p: _ours(p, "none", True, True), "none", rewrites=True, keeps=True),
    Contestant(
        "ours behind native, all masked, routes kept",
        _any,
        lambda p: _ours(p, "masked", True, True),
        "masked",
        keeps=True,
        tolerance=OURS_TOLERANCE,
        exact_ids=True,
    ),
    Contestant(
        "vllm topk_softmax", lambda spec: spec.scoring == "softmax" and not spec.grouped, lambda p: _vllm_topk(p, "topk_softmax")
    ),
    Contestant(
        "vllm topk_sigmoid", lambda spec: spec.scoring == "sigmoid" and not spec.grouped, lambda p: _vllm_topk(p, "topk_sigmoid")
    ),
    Contestant("vllm grouped_topk", lambda spec: spec.scoring == "sigmoid", _vllm_grouped),
    Contestant("torch eager", _any, lambda p: lambda slot: torch_gating(p.logits[slot], p.shape.spec, p.correction_bias)),
)
