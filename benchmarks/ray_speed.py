"""What a second Ray worker adds: F-SOUR on one and on two engines of one core each, turn by turn.

As `--ray` does it: engines are Ray actors with whole prompts for jobs, and the driver hands these out and takes the results. The
adaptive strategy on the OLMoE shape of `search_speed.py --device cpu` (random weights, bfloat16, prompts of 48 tokens, targets of
16), the same prompts on both sides. A second is one of the wall clock, so what else runs on the cores is in the figures.

    python benchmarks/ray_speed.py              # needs the library `ray`
    python benchmarks/ray_speed.py --rehearse   # a tiny shape
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import common
from common import NOT_MEASURED, Results, Row, Rows, Run
from search_speed import AMOUNTS, DRAWS, TARGET, token_ids
from shapes import config_of, make_model

from vllm_unsafe_routes.search.backend import Search, Stats, with_notes
from vllm_unsafe_routes.search.fsour import FsourSettings, fsour_attempt
from vllm_unsafe_routes.search.rosais import Prompt
from vllm_unsafe_routes.study import bench as benches
from vllm_unsafe_routes.study.bench import Bench
from vllm_unsafe_routes.study.cluster import RayEngines, RemoteJob, engine_actors

WORKERS = (1, 2)
PROMPTS = 12


@contextmanager
def opened(folder: str, settings: dict[str, Any]) -> Iterator[Bench]:
    """The engine of an actor, in its process."""
    from vllm_unsafe_routes.engine.backend import EngineBackend
    from vllm_unsafe_routes.engine.launch import launch, shutdown

    llm = launch(folder, dtype="bfloat16", max_model_len=256, engine_args=settings)
    try:
        # No job asks for the model or a judge.
        yield SimpleNamespace(backend=EngineBackend(llm))  # type: ignore[misc]
    finally:
        shutdown(llm)


def attempt(prompt: Prompt, _: list[Any]) -> Search[int]:
    """A job: one attempt; its result is how many routes were accepted."""
    from vllm_unsafe_routes.evaluation.judges import Verdict

    assert benches.here is not None
    settings = FsourSettings(
        strategy="adaptive", num_draws=DRAWS, tau=1.0, min_gain=AMOUNTS["cpu"].min_gain, max_new_tokens=AMOUNTS["cpu"].answer
    )
    search = fsour_attempt(benches.here.backend, prompt, settings, 0, lambda *_: Verdict(0.0, False))
    return len((yield from with_notes(search, lambda _: None)).routes)


def timed(engines: RayEngines, prompts: list[Prompt]) -> Row:
    """All prompts once, as many in flight as there are."""
    jobs = [RemoteJob((prompt.id,), partial(attempt, prompt)) for prompt in prompts]
    stats, start = Stats(), time.perf_counter()
    found = dict(engines.run(jobs, concurrency=len(jobs), stats=stats, stop=lambda: False, note=lambda *_: None))
    return {"seconds": time.perf_counter() - start, "candidates": stats.candidates, "routes": sum(found.values())}


def measure(run: Run, results: Results) -> None:
    """Rounds on one actor and on both."""
    import ray

    os.environ.update(common.engine_environment(run, v2=False))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    config = config_of("olmoe", run.size)
    folder = make_model(run.scratch / "ray", config, "bfloat16")
    length, count = (8, 2) if run.rehearse else (AMOUNTS["cpu"].prompt, PROMPTS)
    vocab = config["vocab_size"] - 8
    prompts = [
        Prompt(str(at), tuple(token_ids(2 * at, length, vocab)), tuple(token_ids(2 * at + 1, TARGET, vocab))) for at in range(count)
    ]
    ray.init(address="local", num_cpus=max(WORKERS), include_dashboard=False, log_to_driver=False)
    try:
        actors = engine_actors(partial(opened, str(folder), common.engine_settings(run)), 1, max(WORKERS))
        sides = {number: RayEngines(actors[:number]) for number in WORKERS}
        for number, engines in sides.items():
            results.step("warm", workers=number, **timed(engines, prompts[:number]))
        for at in common.rounds(1 if run.rehearse else run.rounds, run.deadline):
            order = WORKERS if at % 2 == 0 else WORKERS[::-1]
            found = {number: timed(sides[number], prompts) for number in order}
            rate = {number: one["candidates"] / one["seconds"] for number, one in found.items()}
            for number in WORKERS:
                row = {"seconds": round(found[number]["seconds"], 3), "candidates_per_s": round(rate[number], 2)}
                row["ratio_to_one"] = round(rate[number] / rate[WORKERS[0]], 3)
                results.row(**{**found[number], **row}, workers=number, round=at, prompts=len(prompts), dtype="bfloat16")
            results.step("round", number=at, **{f"of_{number}": round(value, 1) for number, value in rate.items()})
    finally:
        ray.shutdown()


def table(rows: Rows) -> str:
    """Medians over rounds."""
    lines = []
    for workers in common.distinct(rows, "workers"):
        mine = [row for row in rows if row["workers"] == workers]
        columns = [[float(row[name]) for row in mine] for name in ("candidates_per_s", "ratio_to_one")]
        lines.append([workers, common.spread(columns[0], 1, 1), common.spread(columns[1], 2, 2)])
    if not lines:
        return NOT_MEASURED
    made = common.markdown(["Ray workers of one core", "candidates/s", "against one"], lines)
    count = max(int(row["round"]) for row in rows) + 1
    note = f"F-SOUR, adaptive, {rows[0]['prompts']} prompts; a second is one of the wall clock; median and range of {count} rounds"
    return f"{made}\n\n{note}; {common.where(rows)}"


def main() -> int:
    run = common.run_of(common.parser(__doc__, rounds=4).parse_args())
    results = Results(run, "ray_speed")
    measure(run, results)
    print(table(results.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
