"""Cells of one engine against the same candidates as requests and against transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engines import random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan
from vllm_unsafe_routes.cells import Cells
from vllm_unsafe_routes.engine.cell_blocks import ask
from vllm_unsafe_routes.search.scorer import RouteScorer

TOLERANCE = 1e-5


class Case:
    """A prompt, its target, a base plan and candidates on top of it.

    Args:
        rng: what everything is drawn from.
        shape: the model's.
        base: the base plan.
        count: candidates, the first of which is the base itself.
        banned: experts that no candidate may use.

    """

    def __init__(self, rng: random.Random, shape: Any, base: RoutePlan, count: int = 5, banned: tuple[int, ...] = ()) -> None:
        self.prompt = random_prompt(rng, rng.randrange(2, 70), VOCAB_SIZE)
        self.target = random_prompt(rng, rng.randrange(1, 20), VOCAB_SIZE)
        self.shape, self.base, self.count, self.banned = shape, base, count, banned
        self.draw(rng)

    def draw(self, rng: random.Random) -> None:
        """Other candidates: single cells, spans, and two layers at once, never where the base forces something."""
        experts = [expert for expert in range(self.shape.num_experts) if expert not in self.banned]
        taken = {(item.layer, at) for item in self.base.directives if item.kind == "force" for at in item.positions}
        self.candidates: list[list[Any]] = [[]]
        while len(self.candidates) < self.count:
            moves: list[Any] = []
            for layer in rng.sample(self.shape.moe_layers, 1 + (len(self.candidates) % 3 == 0)):
                start = rng.randrange(len(self.prompt))
                end = rng.randrange(start, len(self.prompt)) + 1 if len(self.candidates) % 2 else start + 1
                if taken.isdisjoint((layer, at) for at in range(start, end)):
                    moves.append((layer, start, end, rng.sample(experts, self.shape.top_k)))
            if moves:
                self.candidates.append(moves)

    def plan(self, moves: list[Any]) -> RoutePlan:
        """A candidate as a plan."""
        plan = RoutePlan.from_json(self.base.to_json())
        for layer, start, end, experts in moves:
            plan.force(layer, list(range(start, end)), experts)
        return plan

    @property
    def cells(self) -> Cells:
        """The candidates as cells."""
        return Cells.of(self.prompt, self.target, self.base.to_string(), self.candidates)

    def accept(self, rng: random.Random) -> None:
        """Make the last candidate the base and draw others."""
        self.base = self.plan(self.candidates[-1])
        self.draw(rng)


def check_cases(llm: Any, cases: list[Case], oracle: Any = None) -> list[float]:
    """Compare all candidates of all cases; returns their scores."""
    values = [value for one in ask(llm.llm_engine.engine_core, [case.cells for case in cases]) for value in one.values.tolist()]
    plans = [(case, case.plan(moves)) for case in cases for moves in case.candidates]
    as_requests = RouteScorer(llm).score_many((case.prompt, case.target, plan) for case, plan in plans)
    assert values == pytest.approx(list(as_requests), abs=TOLERANCE)
    if oracle is not None:
        for (case, plan), value in zip(plans, values, strict=True):
            rows = oracle.logprobs(case.prompt + case.target[:-1], len(case.prompt), plan)[len(case.prompt) - 1 :]
            expected = rows[range(len(case.target)), case.target].double().sum().item()
            assert value == pytest.approx(expected, abs=TOLERANCE * (1 + len(case.target)))
    return values


def check_bans(llm: Any, shape: Any) -> None:
    """Bans over all tokens of a layer, on top of bans of two layers."""
    rng, layers = random.Random(8), shape.moe_layers[-2:]
    prompt, target = random_prompt(rng, 40, VOCAB_SIZE), random_prompt(rng, 5, VOCAB_SIZE)
    base = RoutePlan().disable(layers[0], "all", [0]).disable(layers[-1], "all", [0])
    moves, plans = [], []
    for at, layer in enumerate((*layers, *layers)):
        left = [expert for expert in range(1, shape.num_experts) if expert != 1 + at]
        moves.append([(layer, 0, len(prompt) + len(target) - 1, left)])
        plans.append(RoutePlan.from_json(base.to_json()).disable(layer, "all", [1 + at]))
    (found,) = ask(llm.llm_engine.engine_core, [Cells.of(prompt, target, base.to_string(), moves, chooses=True)])
    assert found.values == pytest.approx(RouteScorer(llm).score(prompt, target, plans), abs=TOLERANCE)


def check_cells(llm: Any, shape: Any, oracle: Any = None) -> None:
    """Three prompts of mixed lengths, one under a base with soft directives, whose bases move on twice; then bans."""
    check_bans(llm, shape)
    rng = random.Random(7)
    bases = [RoutePlan().disable(shape.moe_layers[0], "all", [at]) for at in range(3)]
    bases[1].bias(shape.moe_layers[-1], "all", {0: 2.0, 5: -1.0}).demote(shape.moe_layers[0], "prompt", [4])
    cases = [Case(rng, shape, base, banned=(at,)) for at, base in enumerate(bases)]
    for _ in range(3):
        values = check_cases(llm, cases, oracle)
        assert len({round(value, 4) for value in values}) > 6
        for case in cases:
            case.accept(rng)
