"""F-SOUR as a solver for Inspect: a route is searched for each sample, and the sample is answered under it.

    inspect eval vllm_unsafe_routes/advbench -T data=advbench.csv --solver vllm_unsafe_routes/fsour -S folder=FOLDER \
      --model vllm-unsafe-routes/NAME -M base_url=http://host:8000/v1

The search is that of `unsafe-routes fsour --server`, on the server that the evaluated model is on (`--enable-route-overrides`) and
under the policy that `-M policy=` names: same prompts, ids and settings, same draws, routes and verdicts. Samples are searched side
by side, each on its own, so the adaptive strategy has no library of other prompts' routes (`--library-prompts 0`). A second epoch
is the next seed.

`metadata["fsour"]` of a sample says what was found; `plan` is the digest that the answer's receipt names, None where the plain
answer stands. The plan is bound to its prompt: a server that renders the chat otherwise refuses it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from inspect_ai.model import get_model
from inspect_ai.solver import Generate, Solver, TaskState, solver

from ..errors import RouteError
from ..evaluation.datasets import DEFAULT_TARGET, PromptRecord
from ..evaluation.judges import Judge
from ..policy import RoutePolicy
from ..search.attempt import Attempt
from ..search.backend import Search, run_tasks
from ..search.fsour import FsourSettings
from ..search.http import HttpBackend
from ..study.bench import Bench
from ..study.fsour import fsour_record
from ..study.jobs import plain_record
from ..study.judges import judge_of, make_judge
from ..study.model import Item, Model, Wrapper
from ..study.records import Fsour
from ..study.settings import JudgeSettings
from ..wire import PLAN_KEY
from .provider import RoutedAPI


@dataclass(frozen=True, slots=True)
class _Searcher:
    """What every sample's search needs, besides its prompt and the server."""

    model: Model
    judge: Judge
    settings: FsourSettings

    def search(self, item: Item, url: str, policy: RoutePolicy | None, epoch: int) -> Fsour:
        """Search one prompt; the calling thread waits."""
        backend = HttpBackend([url], self.model.path, policy)
        try:
            judge = judge_of(self.model, self.judge, {item.prompt.id: item})
            bench = Bench(self.model, backend, judge, self.settings.max_new_tokens)
            settings = replace(self.settings, seed=self.settings.seed + epoch - 1)
            ((_, record),) = run_tasks(backend, [(item.prompt.id, _plain_answer_first(bench, item, settings))])
            return record
        finally:
            backend.close()


def _plain_answer_first(bench: Bench, item: Item, settings: FsourSettings) -> Search[Fsour]:
    plain = yield from plain_record(bench, item)
    return (yield from fsour_record(bench, item, settings, plain=plain))


def _item_of(model: Model, state: TaskState, target: str) -> Item:
    """The sample as searches take it: what the model gets is what was said to it, what is judged the goal that the task names."""
    *before, last = state.messages
    if last.role != "user" or any(message.role != "system" for message in before):
        raise RouteError(f"sample {state.sample_id}: F-SOUR takes one user message, with system messages before it at most")
    said = PromptRecord(str(state.sample_id), last.text, target or state.target.text or DEFAULT_TARGET)
    wrapper = Wrapper("system", "\n\n".join(message.text for message in before))
    record = replace(said, goal=state.metadata.get("goal", last.text), extra=state.metadata.get("extra", {}))
    return Item(record, model.item(said, wrapper).prompt)


@solver
def fsour(folder: str, judge: str = "refusal", target: str = "", **search: Any) -> Solver:
    """F-SOUR; see the module.

    Args:
        folder: the model's folder, for shape and tokenizer; `lab` for the lab model.
        judge: ends a search, as `--judge` takes it; what an endpoint needs stands behind its name (url=, model=, key_env=).
        target: how an answer that complies begins; empty: the sample's target, or "Sure, here is".
        search: fields of `search.fsour.FsourSettings`: `strategy`, `num_draws`, `num_attempts`, `min_gain`, `max_new_tokens`, ...

    """
    searcher = _Searcher(Model(folder), make_judge(judge, JudgeSettings()), FsourSettings(**search))

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        api = get_model().api
        if not isinstance(api, RoutedAPI):
            raise RouteError("F-SOUR needs a model of the provider vllm-unsafe-routes")
        item = _item_of(searcher.model, state, target)
        found = await asyncio.to_thread(searcher.search, item, api.base_url, api.policy, state.epoch)
        plan = Attempt.from_state(found.final).plan(searcher.settings.weights).for_prompt(item.prompt.token_ids)
        routed = bool(found.final.routes)
        state.metadata["fsour"] = {
            "plan": plan.digest if routed else None,
            "routes": len(found.final.routes),
            "clean": found.final.clean,
            "gain": round(found.final.best - found.final.clean, 3),
            "candidates": found.candidates,
            "attempts": found.attempts,
            "success": found.success,
        }
        extra_body = {"vllm_xargs": {PLAN_KEY: plan.to_string()}} if routed else None
        return await generate(state, temperature=0.0, max_tokens=searcher.settings.max_new_tokens, extra_body=extra_body)

    return solve
