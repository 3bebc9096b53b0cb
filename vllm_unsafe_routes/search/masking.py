"""Router masking (arXiv 2602.08621): mask the L most safety-critical routers, each with the best of S2 random masks.

Two controls belong beside it, because the best of many masks raises any score: random masks (one try at random layers), and
random layers with the best of equally many masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cells import CellScores
from ..errors import RouteError
from ..plan import WEIGHT_MODES, RoutePlan
from .backend import Backend, Search
from .masks import Experts, mask_plan, rng_of
from .rosais import AffirmativeScore, Prompt
from .scorer import check_length

ATTACKS = ("rosais", "random-layers", "random-masks")


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """Settings of router masking.

    Attributes:
        num_layers: L, routers to mask.
        num_masks: S2, masks tried at each.
        seed: of the draws.
        score: as in `RosaisSettings`.
        keep_earlier: the paper leaves open whether the masks chosen before stay on while the next layer is searched. True
            (default): they stay, so that each mask is chosen in the company that it will keep. False: each layer is searched
            alone.
        while_decoding: the paper leaves open whether masks stay on for generated tokens. True (default): they do.
        weights: "masked" (the paper's) or "native", which leaves out what rescaling does.

    """

    num_layers: int = 5
    num_masks: int = 100
    seed: int = 0
    score: str = "next"
    keep_earlier: bool = True
    while_decoding: bool = True
    weights: str = "masked"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_MODES:
            raise RouteError(f"weights {self.weights!r} is not one of {', '.join(WEIGHT_MODES)}")
        for name in ("num_layers", "num_masks"):
            if getattr(self, name) < 1:
                raise RouteError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class MaskResult:
    """What router masking chose.

    Attributes:
        clean: mean p(Q) over the prompts without masks, nats.
        masked: the same under the last search step's best masks.
        masks: (layer, experts), in the order in which they were chosen.
        candidates: plans scored.

    """

    clean: float
    masked: float
    masks: tuple[tuple[int, tuple[int, ...]], ...]
    candidates: int

    def plan(self, settings: MaskSettings, level: int | None = None) -> RoutePlan:
        """The masks, or the first `level` of them, as a plan."""
        return mask_plan(self.masks[:level], "all" if settings.while_decoding else "prompt", settings.weights)


def choose_layers(attack: str, ranking: Sequence[int], settings: MaskSettings, name: str) -> list[int]:
    """The layers to mask: the first of `ranking`, or as many random ones for the controls."""
    count = min(settings.num_layers, len(ranking))
    if attack == "rosais":
        return list(ranking[:count])
    return [int(layer) for layer in rng_of("layers", settings.seed, name).choice(sorted(ranking), count, replace=False)]


def mask_attack(
    backend: Backend,
    prompts: Sequence[Prompt],
    affirmative: Sequence[int],
    layers: Sequence[int],
    settings: MaskSettings,
    num_masks: int | None = None,
) -> Search[MaskResult]:
    """Choose a mask for each layer in turn: the one with the best gain averaged over the prompts.

    One prompt is the paper's sample level; several are its dataset level, with one set of masks for all.

    Args:
        backend: for the model's shape and policy.
        prompts: the prompts.
        affirmative: token ids of the affirmative first words.
        layers: layers to mask, most important first.
        settings: settings.
        num_masks: masks tried a layer; None: `settings.num_masks`. 1 is the control of random masks.

    """
    experts = Experts(backend.shape, backend.policy)
    name = prompts[0].id if len(prompts) == 1 else "dataset"
    scores = [AffirmativeScore(prompt, affirmative, settings.score) for prompt in prompts]
    for prompt, score in zip(prompts, scores, strict=True):
        check_length(backend, len(score.request().token_ids), f"prompt {prompt.id}")
    answers: list[CellScores] = yield [score.cells(None, []) for score in scores]
    clean = float(_means(scores, answers)[0])
    chosen: list[tuple[int, tuple[int, ...]]] = []
    best_value, candidates = clean, 0
    for layer in layers:
        if layer not in experts.searchable:
            continue
        sets = experts.draw_many(num_masks or settings.num_masks, layer, "search-mask", settings.seed, name)
        # Without a directive, a plan says only which weights the candidates have.
        earlier = mask_plan(chosen if settings.keep_earlier else [], "all", settings.weights)
        answers = yield [score.cells(earlier.to_string(), [(layer, mask) for mask in sets]) for score in scores]
        values = _means(scores, answers)
        best = int(np.argmax(values))
        best_value = float(values[best])
        chosen.append((layer, sets[best]))
        candidates += len(sets)
    return MaskResult(clean, best_value, tuple(chosen), candidates)


def _means(scores: Sequence[AffirmativeScore], answers: Sequence[CellScores]) -> npt.NDArray[np.float64]:
    """float64 [num_candidates], p(Q) of each candidate averaged over the prompts."""
    means: npt.NDArray[np.float64] = np.mean([score.values(found) for score, found in zip(scores, answers, strict=True)], axis=0)
    return means
