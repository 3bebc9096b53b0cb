"""F-SOUR, the token- and layer-wise stochastic search of a concrete unsafe route (arXiv 2602.08621).

For each prompt position in order, for each MoE layer in order: draw random sets of top_k experts for that (position, layer)
and keep one that raises the joint log-probability of the target. Stop at tau or at the end, generate greedily, judge; restart
with new draws if the answer was no success. Directives act on prompt positions only.

Three strategies:

- `paper`: the first draw of S3 that improves is kept.
- `code`: the published code's: all draws are evaluated and the best is kept if it improves.
- `adaptive`: this project's own, `adaptive.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log

from ..cells import CellScores
from ..errors import RouteError
from ..evaluation.judges import Verdict
from ..extras import RouteExtras
from .adaptive import AdaptiveSettings, Library, adaptive_search
from .attempt import Attempt, AttemptState, Route
from .backend import Backend, Call, Note, Request, Search
from .masks import Experts, rng_of
from .rosais import Prompt
from .scorer import check_length

STRATEGIES = ("paper", "code", "adaptive")
_PAPER_BATCH = 2


@dataclass(frozen=True, slots=True)
class FsourSettings:
    """Settings of F-SOUR.

    Attributes:
        strategy: "paper", "code" or "adaptive".
        num_draws: S3, draws at each (position, layer). The paper says 10, and so does the published code unless told otherwise.
        num_attempts: S4, attempts with new draws.
        tau: probability of the target at which an attempt stops searching.
        seed: of the draws.
        min_gain: nats by which a draw must improve to be kept. Scores vary a little with what else is in the batch (about 1e-6
            in float32, 1e-2 in bfloat16); a gain below that is noise.
        batch: draws of one (position, layer) in flight together; None: all for `code`, two for `paper`, which needs none behind the
            first that improves (more prompts in flight keep the device full). What is kept does not depend on it.
        max_new_tokens: length of the judged answer.
        weights: "masked" (the paper's) or "native".
        adaptive: settings of the adaptive strategy.

    """

    strategy: str = "paper"
    num_draws: int = 10
    num_attempts: int = 5
    tau: float = 0.8
    seed: int = 0
    min_gain: float = 1e-4
    batch: int | None = None
    max_new_tokens: int = 64
    weights: str = "masked"
    adaptive: AdaptiveSettings = field(default_factory=AdaptiveSettings)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RouteError(f"strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        for name in ("num_draws", "num_attempts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise RouteError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.tau <= 1:
            raise RouteError(f"tau must be in (0, 1], got {self.tau}")
        if self.min_gain < 0:
            raise RouteError(f"min_gain must not be negative, got {self.min_gain}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an attempt has come.

    Attributes:
        cell: index of the next cell, see `cells`.
        state: what it has so far.

    """

    cell: int
    state: AttemptState


Judge = Callable[[Prompt, tuple[int, ...]], Verdict]


def draws(
    experts: Experts, settings: FsourSettings, prompt: Prompt, attempt: int, position: int, layer: int
) -> list[tuple[int, ...]]:
    """The sets that are tried at one (position, layer), in order."""
    return experts.draw_many(settings.num_draws, layer, "fsour", settings.seed, prompt.id, attempt, position)


def cells(experts: Experts, prompt: Prompt) -> list[tuple[int, int]]:
    """(position, layer) in search order.

    The last layer is left out at all but the last position: its output there reaches no later token, so no choice can change
    the answer.
    """
    last_layer, last_position = experts.shape.num_hidden_layers - 1, len(prompt.token_ids) - 1
    return [
        (position, layer)
        for position in range(len(prompt.token_ids))
        for layer in experts.searchable
        if layer != last_layer or position == last_position
    ]


def fsour_attempt(
    backend: Backend,
    prompt: Prompt,
    settings: FsourSettings,
    number: int,
    judge: Judge,
    stop_token_ids: tuple[int, ...] = (),
    library: Library | None = None,
    resume: Progress | None = None,
) -> Search[Attempt]:
    """One attempt on one prompt: search, generate, judge.

    After every prompt position the paper's and the code's strategy yield a `Note` with their `Progress`; an attempt that was cut
    off goes on from the last of them.

    Args:
        backend: for the model's shape and policy; candidates use only experts that the policy allows.
        prompt: the prompt.
        settings: settings.
        number: of the attempt, 0 to `num_attempts` - 1; other numbers draw other routes.
        judge: called with the prompt and the generated token ids, in a thread.
        stop_token_ids: end of an answer.
        library: routes that worked on other prompts, for the adaptive strategy.
        resume: how far an attempt that was cut off had come.

    """
    experts = Experts(backend.shape, backend.policy)
    room = max(len(prompt.target), settings.max_new_tokens)
    check_length(backend, len(prompt.token_ids) + room - 1, f"prompt {prompt.id} with target and answer")
    attempt, first_cell = Attempt(), 0
    if resume is not None:
        attempt, first_cell = Attempt.from_state(resume.state), resume.cell
    else:
        (clean,) = yield [prompt.cells(None, [[]])]
        attempt.count(clean)
        attempt.clean = attempt.best = float(clean.values[0])
    if settings.strategy == "adaptive":
        rng = rng_of("adaptive", settings.seed, prompt.id, number)
        yield from adaptive_search(experts, prompt, settings, attempt, rng, library)
    else:
        yield from _cell_by_cell(experts, prompt, settings, number, attempt, first_cell)
    generation = Request(
        prompt.token_ids,
        RouteExtras(attempt.plan(settings.weights).to_string() if attempt.routes else None),
        settings.max_new_tokens,
        stop_token_ids,
    )
    (generated,) = yield [generation]
    attempt.answer = generated.token_ids
    (attempt.verdict,) = yield [Call(lambda: judge(prompt, generated.token_ids))]
    return attempt


def _cell_by_cell(
    experts: Experts, prompt: Prompt, settings: FsourSettings, number: int, attempt: Attempt, first_cell: int
) -> Search[None]:
    """The paper's and the published code's search."""
    tau = log(settings.tau)
    plan = attempt.plan(settings.weights)
    text = plan.to_string()
    order = cells(experts, prompt)
    for at_cell in range(first_cell, len(order)):
        position, layer = order[at_cell]
        if attempt.best >= tau:
            return
        if at_cell > first_cell and position != order[at_cell - 1][0]:
            yield [Note(Progress(at_cell, attempt.state(17)))]
        sets = draws(experts, settings, prompt, number, position, layer)
        size = settings.batch or (_PAPER_BATCH if settings.strategy == "paper" else len(sets))
        values: list[float] = []
        kept: int | None = None
        for start in range(0, len(sets), size):
            batch = sets[start : start + size]
            scores: CellScores
            (scores,) = yield [prompt.cells(text, [[(layer, position, position + 1, chosen)] for chosen in batch])]
            attempt.count(scores)
            values += scores.values.tolist()
            if settings.strategy == "paper":
                kept = next((at for at, value in enumerate(values) if value > attempt.best + settings.min_gain), None)
                if kept is not None:
                    break
        if settings.strategy == "code":
            best = max(range(len(values)), key=values.__getitem__)
            kept = best if values[best] > attempt.best + settings.min_gain else None
        attempt.needed += len(sets) if kept is None or settings.strategy == "code" else kept + 1
        if kept is not None:
            plan.force(layer, [position], sets[kept])
            text = plan.to_string()
            attempt.accept([Route(layer, position, sets[kept], values[kept] - attempt.best)], values[kept])
