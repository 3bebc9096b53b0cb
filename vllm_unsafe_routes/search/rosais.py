"""RoSais, the router safety importance score of a layer (arXiv 2602.08621, section on RoSais).

    p(Q)         = max over the affirmative first tokens of log Pr(token | Q)
    RoSais(Q, l) = max over S1 random masks of layer l of [p(Q under the mask) - p(Q)]

A mask leaves exactly top_k experts and holds for every token. What the paper leaves open is a field of `RosaisSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..cells import Cells, CellScores, Move
from ..errors import RouteError
from ..extras import RouteExtras
from ..plan import RoutePlan
from .backend import Backend, Request, Response, Search
from .masks import Experts
from .scorer import check_length, joint, next_token_request, target_request

SCORES = ("next", "target")
LATER_LAYERS = ("free", "clean")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a search.

    Attributes:
        id: names it in records; also seeds its draws.
        token_ids: the whole prompt, chat template included.
        target: token ids of the affirmative answer's beginning.

    """

    id: str
    token_ids: tuple[int, ...]
    target: tuple[int, ...]

    def cells(self, plan: str | None, candidates: Sequence[Sequence[Move]]) -> Cells:
        """The question for the target's score under each candidate's moves on top of a plan."""
        return Cells.of(self.token_ids, self.target, plan, candidates)


@dataclass(frozen=True, slots=True)
class RosaisSettings:
    """Settings of RoSais.

    Attributes:
        num_masks: S1, random masks a layer.
        seed: of the masks.
        score: "next": the paper's, best affirmative first token. "target": mean log-probability a token of the target, which
            sees past the first word.
        later_layers: "free": the layers behind the masked one route as they like, as in the paper. "clean": they keep the
            routes, with weights, of the run without a mask, so that the score is the masked layer's own effect.

    """

    num_masks: int = 20
    seed: int = 0
    score: str = "next"
    later_layers: str = "free"

    def __post_init__(self) -> None:
        if self.num_masks < 1:
            raise RouteError(f"num_masks must be at least 1, got {self.num_masks}")
        if self.score not in SCORES:
            raise RouteError(f"score {self.score!r} is not one of {', '.join(SCORES)}")
        if self.later_layers not in LATER_LAYERS:
            raise RouteError(f"later_layers {self.later_layers!r} is not one of {', '.join(LATER_LAYERS)}")


@dataclass(frozen=True, slots=True)
class RosaisResult:
    """RoSais of one prompt.

    Attributes:
        clean: p(Q), in nats.
        gains: layer -> one gain for each mask, in nats.
        masks: layer -> the masks, in the order of `gains`.

    """

    clean: float
    gains: dict[int, list[float]]
    masks: dict[int, list[tuple[int, ...]]]

    @property
    def scores(self) -> dict[int, float]:
        """RoSais(Q, layer)."""
        return {layer: max(values) for layer, values in self.gains.items()}

    def ranking(self) -> list[int]:
        """Layers, most safety-critical first; equal scores by smaller index."""
        return rank(self.scores)


def rank(scores: Mapping[int, float]) -> list[int]:
    """Layers by descending score, equal ones by smaller index."""
    return sorted(scores, key=lambda layer: (-scores[layer], layer))


class AffirmativeScore:
    """p(Q) under a plan, as a request and a reading of its response.

    Args:
        prompt: the prompt.
        affirmative: token ids of the affirmative first words, see `affirmative_token_ids`; used by "next".
        score: "next" or "target".

    """

    def __init__(self, prompt: Prompt, affirmative: Sequence[int], score: str) -> None:
        self.prompt, self.affirmative, self.score = prompt, affirmative, score
        if score == "next" and not affirmative:
            raise RouteError("no affirmative word is a single token of this tokenizer; use score='target'")

    def request(self, plan: str | None = None) -> Request:
        """The request for p(Q) under `plan`."""
        if self.score == "next":
            return next_token_request(self.prompt.token_ids, self.affirmative, plan)
        return target_request(self.prompt.token_ids, self.prompt.target, plan)

    def value(self, response: Response) -> float:
        """p(Q), in nats."""
        assert response.scores is not None
        return float(response.scores.max()) if self.score == "next" else joint(response) / len(self.prompt.target)

    def cells(self, plan: str | None, masks: Sequence[tuple[int, tuple[int, ...]]]) -> Cells:
        """The question for p(Q) under each mask, (layer, experts), on top of a plan; without a mask, under the plan alone."""
        prompt = self.prompt
        num_tokens = len(prompt.token_ids) + (0 if self.score == "next" else len(prompt.target) - 1)
        candidates: list[list[Move]] = [[(layer, 0, num_tokens, experts)] for layer, experts in masks] or [[]]
        if self.score == "target":
            return prompt.cells(plan, candidates)
        cells = Cells.of(prompt.token_ids, self.affirmative[:1], plan, candidates)
        return replace(cells, target=np.array([self.affirmative], np.int32))

    def values(self, scores: CellScores) -> list[float]:
        """p(Q) of each candidate, in nats."""
        if self.score == "next":
            return [float(value) for value in scores.log_probs.max(axis=(1, 2))]
        return [float(value) / len(self.prompt.target) for value in scores.values]


def rosais(
    backend: Backend, prompt: Prompt, affirmative: Sequence[int], settings: RosaisSettings, draws_for: str | None = None
) -> Search[RosaisResult]:
    """RoSais of every MoE layer for one prompt.

    Args:
        backend: for the model's shape and policy.
        prompt: the prompt.
        affirmative: token ids of the affirmative first words.
        settings: settings.
        draws_for: what seeds the draws beside the seed; None: the prompt's id, so that prompts try different masks. One
            name for all prompts makes gains comparable mask by mask, which the dataset level needs.

    """
    experts = Experts(backend.shape, backend.policy)
    score = AffirmativeScore(prompt, affirmative, settings.score)
    clean_request = score.request()
    check_length(backend, len(clean_request.token_ids), f"prompt {prompt.id}")
    keep_clean = settings.later_layers == "clean"
    if keep_clean:
        clean_request = Request(clean_request.token_ids, RouteExtras(wants_routes=True, score=clean_request.extras.score))
        (clean_response,) = yield [clean_request]
        clean = score.value(clean_response)
    else:
        (found,) = yield [score.cells(None, [])]
        (clean,) = score.values(found)
    masks = {
        layer: experts.draw_many(settings.num_masks, layer, "mask", settings.seed, draws_for or prompt.id)
        for layer in experts.searchable
    }
    questions = []
    for layer, sets in masks.items():
        later = _replay(clean_response, backend, layer, len(clean_request.token_ids)) if keep_clean else None
        questions.append(score.cells(None if later is None else later.to_string(), [(layer, chosen) for chosen in sets]))
    answers: list[CellScores] = yield questions
    gains = {layer: [value - clean for value in score.values(scores)] for layer, scores in zip(masks, answers, strict=True)}
    return RosaisResult(clean, gains, masks)


def _replay(response: Response, backend: Backend, layer: int, num_tokens: int) -> RoutePlan | None:
    """The clean run's routes of the layers behind `layer`, None for the last."""
    assert response.route_ids is not None and response.route_weights is not None
    slots = [slot for slot, other in enumerate(backend.shape.moe_layers) if other > layer]
    if not slots:
        return None
    return RoutePlan.from_routes(
        response.route_ids[:num_tokens, slots],
        response.route_weights[:num_tokens, slots],
        layers=[backend.shape.moe_layers[slot] for slot in slots],
    )


class Scored(Protocol):
    """A prompt's masks and what each gained: a `RosaisResult`, or a record of one."""

    @property
    def gains(self) -> Mapping[int, Sequence[float]]:
        """Layer -> one gain for each mask, nats."""

    @property
    def masks(self) -> Mapping[int, Sequence[tuple[int, ...]]]:
        """Layer -> the masks."""


def share_masks(results: Sequence[Scored]) -> bool:
    """Whether all prompts tried the same masks."""
    return all(result.masks == results[0].masks for result in results)


def dataset_scores(results: Sequence[Scored]) -> dict[int, float]:
    """Dataset-level RoSais: the best mask's gain averaged over prompts, nats.

    Raises:
        RouteError: the prompts tried different masks.

    """
    if not share_masks(results):
        raise RouteError("dataset-level RoSais needs the same masks for every prompt: run rosais with one draws_for")
    return {layer: float(np.mean([result.gains[layer] for result in results], axis=0).max()) for layer in results[0].gains}
