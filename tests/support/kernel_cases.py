"""Inputs for kernel tests, and the specification once more as a slow loop over tokens in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from vllm_unsafe_routes.kernels.spec import (
    FLAG_EXPLICIT_WEIGHTS,
    FLAG_FORCED,
    FLAG_NATIVE_WEIGHTS,
    FLAG_SCORE_BIAS,
    FLAG_STEERED,
    STEERING_MARGIN,
    GatingSpec,
    RouteRows,
    pack_allowed,
)

# Largest absolute error of a weight against float64. Origin: about 8 float32 roundings of values up to 1 (exp, sum, division,
# renormalisation) times the scaling factor 2.5 used here, doubled.
WEIGHT_TOLERANCE = 4e-6


@dataclass
class Case:
    """One call of the op, and its rows in readable form."""

    spec: GatingSpec
    logits: torch.Tensor
    row_index: torch.Tensor | None
    rows: RouteRows | None
    correction_bias: torch.Tensor | None
    is_padding: torch.Tensor | None


def random_rows(rng: random.Random, spec: GatingSpec, num_rows: int, soft: bool) -> RouteRows:
    """Rows of every kind in turn: masks, forced ids, explicit weights, native weights; `soft`: biases, promoted and demoted too."""
    experts, top_k = spec.num_experts, spec.top_k
    allowed = torch.zeros(num_rows, experts, dtype=torch.bool)
    flags, forced_ids = torch.zeros(num_rows, dtype=torch.int32), torch.full((num_rows, top_k), -7, dtype=torch.int32)
    forced_weights = torch.full((num_rows, top_k), math.nan)
    steered = torch.zeros(num_rows, 2, experts, dtype=torch.bool)
    for row in range(num_rows):
        left = rng.randrange(top_k, experts + 1)
        allowed[row, rng.sample(range(experts), left)] = True
        kind = row % 4
        if kind in (1, 2):
            flags[row] |= FLAG_FORCED
            forced_ids[row] = torch.tensor(rng.sample(range(experts), top_k))
        if kind == 2:
            flags[row] |= FLAG_EXPLICIT_WEIGHTS
            forced_weights[row] = torch.tensor([rng.uniform(0, 2) for _ in range(top_k)])
        if rng.random() < 0.4:
            flags[row] |= FLAG_NATIVE_WEIGHTS
        if soft:
            flags[row] |= rng.choice([0, FLAG_SCORE_BIAS, FLAG_STEERED, FLAG_SCORE_BIAS | FLAG_STEERED])
            # Now and then also what an engine never asks for: as many as fit, excluded ones, all of them.
            steered[row, 0, rng.sample(range(experts), rng.choice([0, 1, rng.randrange(top_k + 1)]))] = True
            steered[row, 1, rng.sample(range(experts), rng.choice([0, 1, experts // 2, rng.randrange(experts + 1)]))] = True
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    score_bias = torch.randn(num_rows, experts, generator=generator)
    rows = RouteRows(flags, pack_allowed(allowed), forced_ids, forced_weights)
    return rows._replace(score_bias=score_bias, steered=pack_allowed(steered)) if soft else rows


def make_case(
    seed: int,
    spec: GatingSpec,
    num_tokens: int = 8,
    dtype: torch.dtype = torch.float32,
    directives: str = "mixed",
    correction_bias: bool = False,
    soft: bool = False,
    padding: bool = False,
    stride: int = 0,
    ties: bool = False,
) -> Case:
    """A case from a seed. `directives`: "none", "mixed" or "all"; `stride`: extra columns between the rows of logits."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(num_tokens, spec.num_experts + stride, generator=generator) * 1.5
    if ties:
        storage = storage.round()
    logits = storage.to(dtype)[:, : spec.num_experts]
    row_index = rows = None
    if directives != "none":
        rows = random_rows(rng, spec, 12, soft)
        numbers = [rng.randrange(12) if directives == "all" or rng.random() < 0.6 else -1 for _ in range(num_tokens)]
        row_index = torch.tensor(numbers, dtype=torch.int32)
    bias = torch.randn(spec.num_experts, generator=generator) * 0.3 if correction_bias else None
    is_padding = torch.rand(num_tokens, generator=generator) < 0.3 if padding else None
    return Case(spec, logits, row_index, rows, bias, is_padding)


def loop(case: Case) -> tuple[list[list[float]], list[list[int]]]:
    """Weights and ids by the specification's text, one token at a time, scores in float64."""
    return tuple(map(list, zip(*[_token(case, token) for token in range(len(case.logits))], strict=True))) or ([], [])


def _token(case: Case, token: int) -> tuple[list[float], list[int]]:
    spec, rows = case.spec, case.rows
    experts = range(spec.num_experts)
    largest = torch.finfo(torch.float32).max

    def finite(value: float) -> float:
        return -largest if math.isnan(value) else min(max(value, -largest), largest)

    if case.is_padding is not None and case.is_padding[token]:
        return [0.0] * spec.top_k, [-1] * spec.top_k
    x = [finite(value) for value in case.logits[token].float().tolist()]
    row = -1 if case.row_index is None else int(case.row_index[token])
    flags, allowed, forced, biased = 0, list(experts), [], x
    promoted: list[int] = []
    demoted: set[int] = set()
    if row >= 0 and rows is not None:
        flags = int(rows.flags[row])

        def members(words: torch.Tensor) -> list[int]:
            return [e for e in experts if int(words[e // 32]) >> (e % 32) & 1]

        allowed = members(rows.allowed[row])
        if flags & FLAG_FORCED:
            allowed = forced = rows.forced_ids[row].tolist()
        if flags & FLAG_SCORE_BIAS and rows.score_bias is not None:
            biased = [finite(value + bias) for value, bias in zip(x, rows.score_bias[row].tolist(), strict=True)]
        if flags & FLAG_STEERED and not flags & FLAG_FORCED and rows.steered is not None:
            promoted = [e for e in members(rows.steered[row, 0]) if e in allowed]
            demoted = set(members(rows.steered[row, 1])) & set(allowed) - set(promoted)

    def score(values: list[float], among: list[int]) -> dict[int, float]:
        if spec.scoring == "sigmoid":
            return {e: 1 / (1 + math.exp(-values[e])) if values[e] > -700 else 0.0 for e in experts}
        if spec.scoring == "sqrtsoftplus":
            return {e: math.sqrt(max(values[e], 0) + math.log1p(math.exp(-abs(values[e])))) for e in experts}
        top = max((values[e] for e in among), default=0.0)
        exps = {e: math.exp(values[e] - top) for e in among}
        total = sum(exps.values())
        return {e: exps.get(e, 0.0) / total if total else 0.0 for e in experts}

    own = score(biased, allowed)
    if spec.scoring == "softmax" and case.correction_bias is None:
        choice = dict(enumerate(biased))
    else:
        choice = {e: own[e] + (0.0 if case.correction_bias is None else float(case.correction_bias[e])) for e in experts}

    def best(ids: list[int], count: int) -> list[int]:
        return sorted(ids, key=lambda e: (-choice[e], e))[:count]

    outside: list[int] = []
    inside = allowed
    if spec.grouped:
        size = spec.num_experts // spec.num_expert_group
        of_group = {}
        for group in range(spec.num_expert_group):
            first = best([e for e in allowed if e // size == group and e not in demoted], 1 if spec.group_score == "max" else 2)
            of_group[group] = sum(choice[e] for e in first) if first else -math.inf
        groups = sorted(of_group, key=lambda group: (-of_group[group], group))[: spec.topk_group]
        inside = [e for e in allowed if e // size in groups]
        outside = [e for e in allowed if e // size not in groups]
    ids = forced or promoted[: spec.top_k]
    for places in [inside, outside, demoted]:
        left = [e for e in places if e not in promoted and (places is demoted or e not in demoted)]
        ids = ids + best(left, spec.top_k - len(ids))
    if flags & FLAG_NATIVE_WEIGHTS:
        weighed = score(x, list(experts))
    elif promoted or demoted:
        top, low = max(biased[e] for e in allowed) + STEERING_MARGIN, min(biased[e] for e in allowed) - STEERING_MARGIN
        weighed = score([finite(top if e in promoted else low if e in demoted else biased[e]) for e in experts], allowed)
    else:
        weighed = own
    weights = [weighed[e] for e in ids]
    missing = spec.top_k - len(ids)
    ids = list(ids) + [ids[0] if ids else 0] * missing
    weights += [0.0] * missing
    if spec.renormalize:
        total = sum(weights)
        weights = [weight / total if total > 0 else 0.0 for weight in weights]
    weights = [weight * spec.routed_scaling_factor for weight in weights]
    if flags & FLAG_EXPLICIT_WEIGHTS and rows is not None:
        weights = rows.forced_weights[row].tolist()
    return weights, ids
