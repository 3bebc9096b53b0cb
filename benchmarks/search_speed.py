"""How fast candidates of a route search are scored: this project's engine against transformers, turn by turn.

The engine scores candidates in two ways, each a column: as requests ("engine"), and as cells in one call to the workers ("cells").
F-SOUR as the published code runs it (the best of all draws is kept), 10 draws at each cell, (position, layer). In a timed round
every prompt visits a few cells, spread evenly over all positions and layers, so that a round costs what as many candidates of whole
attempts cost; a whole attempt is timed beside it. Baselines force experts by -inf on a router's logits, as the published code does:

- `--device cpu`: transformers one candidate a forward pass, and 64, with the faster of its expert implementations; the OLMoE shape
  with 8 layers and hidden size 512, bfloat16, prompts of 48 tokens with targets of 16. With one thread a second is one of CPU time.
- `--device cuda`: transformers one candidate a forward pass, with the loop over experts that the published code ran on and with the
  fastest implementation that it has now; published shapes with dummy weights, prompts of 28 tokens. Also RoSais of every layer
  (S1 = 20) and the best layer masked with S2 = 100 masks. What transformers would take for an attempt or for RoSais is its time a
  forward pass times the number of passes.

Nothing is timed before the sides agree on scores of a small model with equal weights (`--agreed`: that was checked elsewhere).

    python benchmarks/search_speed.py                               # the tables' figures on CPU
    python benchmarks/search_speed.py --memory [--long]             # peak memory over the number of candidates, lab model
    LD_PRELOAD=libtcmalloc_minimal.so.4 python benchmarks/search_speed.py --memory  # the same with another allocator
    python benchmarks/search_speed.py --profile                     # where the engine's time goes
    python benchmarks/search_speed.py --rate                        # the rate of matrix products alone; every round has it too
    python benchmarks/search_speed.py --device cuda --mode full --models olmoe
    python benchmarks/search_speed.py --only cells-1-,cells-64-     # these numbers of prompts in flight
    python benchmarks/search_speed.py --rehearse                    # tiny shapes: checks only
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import NOT_MEASURED, Child, ChildFailed, Results, Row, Rows, Run, Talk
from shapes import NAMES, config_of, differing_operations, make_model, sizes_of

TARGET, DRAWS, BATCH, MEMORY_BATCH = 16, 10, 64, 250
# In flight, for a profile; enough cells each that the start of a prompt does not count for more than in a whole search.
PROFILED, CELLS_OF_A_PROMPT = (16, 64), 12
# Rows and columns of the matrices whose product is timed, and how long.
MATRIX, MATRIX_SECONDS = 2048, 0.5
S1, S2, ANSWER = 20, 100, 64
WAYS = ("engine", "cells")
ONE_BY_ONE, BATCHES = "transformers, one by one", f"transformers, batches of {BATCH}"
PUBLISHED, FASTEST = "transformers, one by one, expert loop", "transformers, one by one, fastest experts"
# device -> baseline -> the column of ratios to it
BASELINES = {
    "cpu": {ONE_BY_ONE: "ratio_to_one_by_one", BATCHES: "ratio_to_batches"},
    "cuda": {PUBLISHED: "ratio_to_published", FASTEST: "ratio_to_fastest"},
}
IMPLEMENTATIONS = {"cpu": ("eager", "grouped_mm"), "cuda": ("eager", "grouped_mm", "batched_mm")}
# Nats over the target; two bfloat16 implementations round differently at every layer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
GPU_FLOAT32_TOLERANCE = 2e-3


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much is timed.

    Attributes:
        prompt: prompt tokens.
        cells: way -> prompts in flight -> cells of all of them together in one round.
        passes: candidates of a baseline in one round.
        answer: tokens that a whole attempt generates.
        min_gain: what a route must gain to be kept; scores of dummy weights hardly differ.

    """

    prompt: int
    cells: dict[str, dict[int, int]]
    passes: int
    answer: int
    min_gain: float


AMOUNTS = {
    "cpu": Amounts(48, {way: {1: 16, 4: 24, 16: 48, 64: 96} for way in WAYS}, 24, 1, 2e-2),
    "cuda": Amounts(28, {"engine": {1: 24, 16: 96}, "cells": {1: 24, 16: 96, 64: 256, 128: 512}}, 24, ANSWER, 0.0),
}
_TINY = {way: {1: 2, 4: 4} for way in WAYS}
TINY_AMOUNTS = {"cpu": Amounts(12, _TINY, 3, 1, 2e-2), "cuda": Amounts(8, _TINY, 2, 4, 0.0)}


def token_ids(seed: int, length: int, vocab: int) -> list[int]:
    """Made-up tokens."""
    rng = random.Random(seed)
    return [rng.randrange(3, vocab) for _ in range(length)]


def evenly(count: int, total: int) -> list[int]:
    """`count` indices of `total` in order, spread evenly without a period, which would meet the same layer again and again."""
    step = round(0.618 * total)
    while math.gcd(step, total) > 1:
        step += 1
    return sorted(at * step % total for at in range(count))


def candidates(shape: Any, count: int, seed: int, length: int) -> list[tuple[int, int, list[int]]]:
    """(layer, position, experts), evenly over positions and layers."""
    rng = random.Random(seed)
    cells = [(layer, position) for position in range(length) for layer in shape.moe_layers]
    return [(*cells[at], rng.sample(range(shape.num_experts), shape.top_k)) for at in evenly(count, len(cells))]


class Watch:
    """Wall clock and CPU time of this process since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds of both."""
        return {"seconds": time.perf_counter() - self._start[0], "cpu_seconds": time.process_time() - self._start[1]}


# The children.


def matrix_rate(dtype: str) -> Row:
    """A large matrix product of torch, again and again: the most that the threads of this process do in this dtype.

    Returns:
        `operations`, two a multiply-add, and the seconds that they took.

    """
    import torch

    one, other = (torch.randn(MATRIX, MATRIX).to(getattr(torch, dtype)) for _ in range(2))
    torch.mm(one, other)
    count, watch = 0, Watch()
    while watch.read()["cpu_seconds"] < MATRIX_SECONDS:
        torch.mm(one, other)
        count += 1
    return {**watch.read(), "operations": count * 2 * MATRIX**3}


def serve_rate(options: dict[str, Any]) -> Talk:
    """Child: matrix products alone."""
    yield "ready"
    while True:
        yield matrix_rate(options["dtype"])


class Transformers:
    """The baseline: -inf added to a router's logits at one position.

    Args:
        folder: the model; random weights where it has none.
        dtype: of the weights.
        device: where they are.

    """

    def __init__(self, folder: str, dtype: str, device: str) -> None:
        import torch
        import transformers

        from vllm_unsafe_routes import ModelShape

        self.torch, self.device = torch, device
        config = transformers.AutoConfig.from_pretrained(folder)
        if any(Path(folder).glob("*.safetensors")):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            model = model.to(device)
        else:
            with torch.device(device):
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.model, self.shape, self.vocab = model.eval(), ModelShape.from_hf_config(config), config.vocab_size - 8
        self._scale = getattr(config, "routed_scaling_factor", None) or 1.0
        self._masks: dict[int, Any] = {}
        for layer in self.shape.moe_layers:
            model.model.layers[layer].mlp.gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        torch = self.torch

        def hook(gate: Any, inputs: Any, output: Any) -> Any:
            if layer not in self._masks:
                return output
            logits = output[0] + self._masks[layer]
            # Both families: softmax over all experts, no renormalisation.
            weights, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float), self.shape.top_k, dim=-1)
            return logits, (weights * self._scale).to(output[1].dtype), ids

        return hook

    def score(self, prompt: Sequence[int], target: Sequence[int], forced: Sequence[Any], batch: int) -> list[float]:
        """Joint log-probability of the target for each forced (layer, position, experts)."""
        torch = self.torch
        tokens = torch.tensor([*prompt, *target[:-1]], device=self.device)
        wanted = torch.tensor(target, device=self.device)
        values: list[float] = []
        for start in range(0, len(forced), batch):
            group = forced[start : start + batch]
            self._masks.clear()
            for at, (layer, position, experts) in enumerate(group):
                if layer not in self._masks:
                    size = (len(group) * len(tokens), self.shape.num_experts)
                    self._masks[layer] = torch.zeros(size, dtype=self.model.dtype, device=self.device)
                row = self._masks[layer][at * len(tokens) + position]
                row.fill_(-torch.inf)
                row[experts] = 0
            with torch.inference_mode():
                logits = self.model(tokens.expand(len(group), -1), use_cache=False, logits_to_keep=len(target)).logits
                rows = logits.float().log_softmax(-1)
                found = rows.gather(-1, wanted.expand(len(group), -1)[..., None])[..., 0]
            values += found.double().sum(-1).tolist()
        self._masks.clear()
        return values


def serve_transformers(options: dict[str, Any]) -> Talk:
    """Child: the baselines."""
    baseline = Transformers(options["folder"], options["dtype"], options["device"])
    command = yield "ready"
    while True:
        batch = command.get("batch")
        if command["do"] == "score":
            command = yield baseline.score(command["prompt"], command["target"], command["forced"], batch)
            continue
        if command["do"] == "rate":
            command = yield matrix_rate(options["dtype"])
            continue
        try:
            baseline.model.set_experts_implementation(command["experts"])
            baseline.score([3, 4, 5], [6, 7], [(baseline.shape.moe_layers[0], 0, list(range(baseline.shape.top_k)))], 1)
        except Exception as error:
            command = yield {"unavailable": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]}
            continue
        length, seed = command["length"], command["seed"]
        prompt, target = token_ids(seed, length, baseline.vocab), token_ids(seed + 1, command["target"], baseline.vocab)
        forced = candidates(baseline.shape, command["count"], seed, length)
        watch = Watch()
        baseline.score(prompt, target, forced, batch)
        tokens = len(forced) * (length + len(target) - 1)
        more = {"candidates": len(forced), "tokens": tokens, "computed": tokens, "note": command["experts"]}
        command = yield {**watch.read(), **more}


def serve_engine(options: dict[str, Any]) -> Talk:
    """Child: the engine, with this project's own search on it."""
    common.support_path()
    if options["device"] == "cpu":
        import engines  # noqa: F401 - the environment of CPU engines
    from vllm_unsafe_routes import RoutePlan
    from vllm_unsafe_routes.cells import Cells
    from vllm_unsafe_routes.engine.launch import launch
    from vllm_unsafe_routes.search.scorer import RouteScorer

    llm = launch(options["folder"], dtype=options["dtype"], max_model_len=256, engine_args=options["settings"])
    scorer = RouteScorer(llm)
    search = Search(scorer.backend, int(llm.llm_engine.vllm_config.model_config.get_vocab_size()) - 8)
    command = yield "ready"
    while True:
        do = command.pop("do")
        if do == "score":
            plans = [RoutePlan().force(layer, [position], experts) for layer, position, experts in command["forced"]]
            command = yield scorer.score(command["prompt"], command["target"], plans).tolist()
        elif do == "cells":
            moves = [[(layer, position, position + 1, experts)] for layer, position, experts in command["forced"]]
            (found,) = scorer.backend.score_cells([Cells.of(command["prompt"], command["target"], None, moves)])  # type: ignore[misc]
            command = yield found.values.tolist()
        elif do == "profiled":
            command = yield profiled(search, command)
        elif do == "python_of":
            command = yield python_of(search, command)
        else:
            command = yield getattr(search, do)(**command)


class Search:
    """What is timed on the engine.

    Args:
        backend: the engine's.
        vocab: tokens below this one are used.

    """

    def __init__(self, backend: Any, vocab: int) -> None:
        from vllm_unsafe_routes.search import fsour

        self.backend, self.vocab = backend, vocab
        self._chosen: dict[str, list[int] | None] = {}
        whole = fsour.cells

        def some_cells(experts: Any, prompt: Any) -> list[tuple[int, int]]:
            order = whole(experts, prompt)
            chosen = self._chosen.get(prompt.id)
            return order if chosen is None else [order[at] for at in chosen]

        fsour.cells = some_cells

    def prompt(self, name: str, length: int, seed: int) -> Any:
        """A made-up prompt with a made-up target."""
        from vllm_unsafe_routes.search.rosais import Prompt

        return Prompt(name, tuple(token_ids(seed, length, self.vocab)), tuple(token_ids(seed + 1, TARGET, self.vocab)))

    def attempts(
        self,
        in_flight: int,
        cells: int | None,
        length: int,
        seed: int,
        min_gain: float,
        answer: int = 1,
        way: str = "cells",
        strategy: str = "code",
    ) -> Row:
        """F-SOUR on some prompts; all their cells, or `cells` of all prompts together."""
        self.backend.has_cells = way == "cells"
        from vllm_unsafe_routes.evaluation.judges import Verdict
        from vllm_unsafe_routes.search.backend import Stats, run_tasks
        from vllm_unsafe_routes.search.fsour import FsourSettings, fsour_attempt

        settings = FsourSettings(strategy=strategy, num_draws=DRAWS, tau=1.0, min_gain=min_gain, max_new_tokens=answer)
        prompts = [self.prompt(f"{seed}-{at}", length, seed + 2 * at) for at in range(in_flight)]
        total = length * (len(self.backend.shape.moe_layers) - 1) + 1  # the last layer counts at the last position only
        indices = evenly(cells, total) if cells is not None else []
        for at, prompt in enumerate(prompts):
            self._chosen[prompt.id] = None if cells is None else indices[at::in_flight]
        tasks = [(one.id, fsour_attempt(self.backend, one, settings, 0, lambda *_: Verdict(0.0, False))) for one in prompts]
        watch = Watch()
        found = [attempt for _, attempt in run_tasks(self.backend, tasks, concurrency=in_flight, stats=Stats())]
        times = watch.read()
        assert self.backend.has_cells == (way == "cells"), "the engine cannot score cells; its log says why"
        scored = sum(attempt.candidates for attempt in found)
        expected = DRAWS * (total * in_flight if cells is None else cells) + in_flight
        assert strategy != "code" or scored == expected, f"{scored} candidates scored, expected {expected}"
        return {
            **times,
            "candidates": scored,
            "tokens": sum(attempt.tokens for attempt in found),
            "computed": sum(attempt.computed_tokens for attempt in found),
            "note": f"{sum(len(attempt.routes) for attempt in found)} routes kept",
        }

    def rosais(self, length: int, seed: int, s1: int, s2: int, way: str = "cells") -> Row:
        """RoSais of every layer, then `s2` masks of the best one."""
        self.backend.has_cells = way == "cells"
        from vllm_unsafe_routes.search.backend import run_search
        from vllm_unsafe_routes.search.masking import MaskSettings, mask_attack
        from vllm_unsafe_routes.search.rosais import RosaisSettings, rosais

        prompt, words = self.prompt(f"rosais-{seed}", length, seed), list(range(20, 30))
        watch = Watch()
        ranking = run_search(self.backend, rosais(self.backend, prompt, words, RosaisSettings(s1))).ranking()
        middle = watch.read()["seconds"]
        masking = mask_attack(self.backend, [prompt], words, ranking[:1], MaskSettings(num_layers=1, num_masks=s2))
        run_search(self.backend, masking)
        return {**watch.read(), "rosais_seconds": middle, "candidates": 2 + s1 * len(self.backend.shape.moe_layers) + s2}


def profiled(search: Search, command: dict[str, Any]) -> Row:
    """A run under cProfile, with the functions that took longest by themselves."""
    import cProfile
    import pstats

    profile = cProfile.Profile(time.process_time)
    profile.enable()
    found = search.attempts(**command)
    profile.disable()
    rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    own = sorted(((values[2], values[3], name) for name, values in rows.items()), reverse=True)
    return {
        **found,
        "rows": [(f"{Path(path).name}:{line} {name}", took, cum) for took, cum, (path, line, name) in own[:60]],
    }


def python_of(search: Search, command: dict[str, Any]) -> dict[str, float]:
    """CPU milliseconds a candidate by what they are spent on, as cells and without a profiler.

    Returns:
        `layers`: vLLM's model code and the scores, its Python included; `moved`: the residual stream and KV blocks, copied between
        passes; `answers`: the request of each prompt at the end, which a round has for few candidates; `python`: everything else,
        which is this project's search, arrays and attention metadata; and `passes` through one layer.

    """
    from vllm_unsafe_routes.engine.layer_range import LayerRange
    from vllm_unsafe_routes.engine.scoring import Scoring
    from vllm_unsafe_routes.engine.sweep import Sweep

    parts: dict[str, list[tuple[Any, str]]] = {
        "layers": [(LayerRange, "run"), (Scoring, "of_rows")],
        "moved": [(LayerRange, "copy_blocks"), *((Sweep, name) for name in ("_joined", "_of_bases", "_keep"))],
        "answers": [(type(search.backend), name) for name in ("submit", "poll")],
    }
    spent: dict[str, float] = dict.fromkeys(parts, 0.0)
    open_calls, passes = [], 0
    held = {(owner, name): (getattr(owner, name), what) for what, places in parts.items() for owner, name in places}

    def timed(own: Any, what: str) -> Any:
        def call(*args: Any) -> Any:
            nonlocal passes
            if own.__qualname__ == "LayerRange.run":
                passes += args[2] - args[1]
            start = time.process_time()
            open_calls.append(own)
            try:
                return own(*args)
            finally:
                open_calls.pop()
                # What one of these calls within another is the other's.
                spent[what] += 0 if open_calls else time.process_time() - start

        return call

    try:
        for (owner, name), (own, what) in held.items():
            setattr(owner, name, timed(own, what))
        found = search.attempts(**command)
    finally:
        for (owner, name), (own, _) in held.items():
            setattr(owner, name, own)
    spent["python"] = found["cpu_seconds"] - sum(spent.values())
    return {**{what: 1000 * took / found["candidates"] for what, took in spent.items()}, "passes": passes / found["candidates"]}


def agreement(options: dict[str, Any]) -> Talk:
    """Child: the engine and transformers, here in one process, agree on scores under forced routes of a small model.

    Raises:
        AssertionError: they differ, or the forced routes change nothing.

    """
    common.support_path()
    import tiny_models

    on_gpu, latent = options["device"] == "cuda", options["model"] == "deepseek_v2_lite"
    dtype = "bfloat16" if latent and on_gpu else "float32"  # latent attention has 16-bit kernels only
    tolerance = GPU_FLOAT32_TOLERANCE if on_gpu and dtype == "float32" else TOLERANCE[dtype]
    more: dict[str, Any] = {"topk_method": "greedy", "n_group": 1, "topk_group": 1} if latent else {}
    if latent and on_gpu:
        more |= {"num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 128, "v_head_dim": 128}
        more |= {"hidden_size": 256}
    family = "deepseek_v2" if latent else "olmoe"
    folder = str(tiny_models.make_model(family, Path(options["scratch"], f"agree-{options['model']}"), **more))
    baseline = Transformers(folder, dtype, options["device"])
    length = AMOUNTS["cuda"].prompt
    prompt, target = token_ids(1, length, baseline.vocab), token_ids(2, TARGET, baseline.vocab)
    forced = candidates(baseline.shape, options["count"], 3, length)
    scores = [baseline.score(prompt, target, forced, batch) for batch in (1, BATCH)]
    engine = serve_engine({**options, "folder": folder, "dtype": dtype})
    next(engine)
    scores += [engine.send({"do": do, "prompt": prompt, "target": target, "forced": forced}) for do in ("score", "cells")]
    worst = furthest(scores, tolerance)
    yield {"candidates": len(forced), "dtype": dtype, "nats_apart": worst}


def furthest(scores: list[list[float]], tolerance: float) -> float:
    """The largest difference between the sides, in nats.

    Raises:
        AssertionError: it is more than the tolerance, or the candidates do not differ among themselves.

    """
    worst = max(abs(a - b) for first, second in itertools.combinations(scores, 2) for a, b in zip(first, second, strict=True))
    assert worst <= tolerance, f"the scores differ by {worst:.2g} nats, more than {tolerance}: nothing is timed"
    assert max(scores[0]) - min(scores[0]) > tolerance / 100, "the candidates do not differ: nothing is forced"
    return worst


def agreement_options(key: str, run: Run) -> dict[str, Any]:
    """Settings of the child `agreement`."""
    device, latent = ("cuda" if run.on_gpu else "cpu"), key == "deepseek_v2_lite"
    settings = common.engine_settings(run, common.GIB, max_num_seqs=64, max_num_batched_tokens=1024)
    settings |= {} if latent else common.float32_settings(run)
    settings |= common.latent_settings(run) if latent else {}
    settings.pop("dtype", None)
    count = 12 if run.rehearse else 64
    return {"name": key, "model": key, "device": device, "scratch": str(run.scratch), "settings": settings, "count": count}


def resident(field: str) -> float:
    """Memory of this process in MiB: "VmRSS", what is resident now; "VmHWM", the most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def without_free_pages() -> float:
    """Resident memory in MiB once glibc's allocator has given back what is free: it keeps tensors' memory for the next ones."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def allocator() -> str:
    """Whose `malloc` this process has."""
    found = re.search(r"/lib(tcmalloc|jemalloc|mimalloc)", Path("/proc/self/maps").read_text())
    return found[1] if found else "glibc"


def serve_memory(options: dict[str, Any]) -> Talk:
    """Child: peak memory over a stream of ever more candidates as cells of the lab model; every call has another base plan."""
    from vllm_unsafe_routes import RoutePlan, lab
    from vllm_unsafe_routes.cells import Cells
    from vllm_unsafe_routes.engine.launch import launch
    from vllm_unsafe_routes.search.scorer import make_backend
    from vllm_unsafe_routes.study.model import Model
    from vllm_unsafe_routes.study.prompts import read_prompts

    model = Model("lab")
    prompt, shape, rng = model.item(read_prompts("lab:search", 1)[0]).prompt, model.shape, random.Random(0)

    def place() -> tuple[int, int, list[int]]:
        position = rng.randrange(len(prompt.token_ids))
        return rng.choice(shape.moe_layers), position, rng.sample(range(shape.num_experts), shape.top_k)

    def stream(count: int) -> int:
        scored = 0
        while scored < count:
            layer, position, experts = place()
            base = RoutePlan().force(layer, [position], experts).to_string()
            moves = [
                [(layer, at, at + 1, experts)] for layer, at, experts in (place() for _ in range(min(MEMORY_BATCH, count - scored)))
            ]
            (found,) = backend.score_cells([Cells.of(prompt.token_ids, prompt.target, base, moves)])  # type: ignore[misc]
            scored += len(found.values)
        return scored

    backend = make_backend(launch(str(lab.model_path()), dtype="float32"))
    # Long enough to fill what is bounded: bases, remembered plans, allocator pools.
    stream(options["warm_up"])
    command = yield allocator()
    while True:
        Path("/proc/self/clear_refs").write_text("5")
        watch = Watch()
        found = {"candidates": stream(command["count"]), **watch.read(), "peak": resident("VmHWM")}
        command = yield {**found, "in_use": without_free_pages()}


# The parent.


class Setting(NamedTuple):
    """What both sides have alike: OpenMP threads on CPU, and the dtype of weights."""

    threads: int
    dtype: str


def start(kind: str, key: str, folder: Path, run: Run, setting: Setting, log: Path) -> Child:
    """The process of one side."""
    options: dict[str, Any] = {
        "name": key,
        "folder": str(folder),
        "dtype": setting.dtype,
        "device": "cuda" if run.on_gpu else "cpu",
    }
    more: dict[str, Any] = {} if run.size == "cpu" else {"load_format": "dummy"}
    kv_bytes = 2 * common.GIB
    if run.on_gpu:
        # Scores take rows times vocabulary in float32 beside the KV cache, and transformers is on the same GPU.
        # Cells take half of the KV cache.
        kv_bytes = (8 if key == "olmoe" else 2) * common.GIB
        more |= {"max_num_seqs": 1024, "max_num_batched_tokens": 16384 if key == "olmoe" else 8192}
    elif run.rehearse:
        more |= {"max_num_seqs": 64, "max_num_batched_tokens": 1024}
    more |= common.latent_settings(run) if key == "deepseek_v2_lite" else {}
    options["settings"] = common.engine_settings(run, kv_bytes, **more)
    env = common.engine_environment(run, v2=False)
    return Child(__file__, kind, options, log, env if run.on_gpu else {**env, "OMP_NUM_THREADS": str(setting.threads)})


@dataclass(frozen=True, slots=True)
class Sides:
    """Both processes of one model.

    Attributes:
        key: the model.
        run: the benchmark's.
        setting: of both.
        engine: this project's.
        baseline: transformers.
        fastest: baseline -> its expert implementation.

    """

    key: str
    run: Run
    setting: Setting
    engine: Child
    baseline: Child
    fastest: dict[str, str]

    @property
    def amounts(self) -> Amounts:
        """How much is timed."""
        return (TINY_AMOUNTS if self.run.rehearse else AMOUNTS)[self.run.device]

    @property
    def variants(self) -> list[str]:
        """Baselines first; `--only cells-1-,cells-64-` leaves the other numbers in flight out."""
        ours = {f"{way}-{count}-": f"{way}, {count} in flight" for way in WAYS for count in self.amounts.cells[way]}
        return [*BASELINES[self.run.device], *(ours[name] for name in self.run.wanted(ours))]

    def rate(self, found: Row) -> float:
        """Candidates a second: of CPU time with one thread, which other work hardly changes, else of the wall clock."""
        of_cpu = self.run.device == "cpu" and self.setting.threads == 1
        return float(found["candidates"] / found["cpu_seconds" if of_cpu else "seconds"])

    def passes(self, count: int, seed: int, experts: str, batch: int = 1, target: int = TARGET) -> Row:
        """Forward passes of transformers."""
        sizes = {"length": self.amounts.prompt, "target": target, "count": count, "batch": batch}
        found: Row = self.baseline.ask(self.run.left, do="time", seed=seed, experts=experts, **sizes)
        return found

    def measure(self, variant: str, seed: int) -> Row:
        """One variant's part of a round."""
        if variant in BASELINES[self.run.device]:
            batch = BATCH if variant == BATCHES else 1
            count = self.amounts.passes if batch == 1 else BATCH * (1 if self.run.rehearse else 3)
            return self.passes(count, seed, self.fastest[variant], batch)
        way, in_flight = variant.split(",")[0], int(variant.split()[1])
        amounts = self.amounts
        cells = amounts.cells[way][in_flight]
        sizes = {"in_flight": in_flight, "cells": cells, "length": amounts.prompt, "min_gain": amounts.min_gain}
        found: Row = self.engine.ask(self.run.left, do="attempts", seed=seed, way=way, **sizes)
        return found

    def choose(self, results: Results) -> None:
        """Find each baseline's fastest expert implementation."""
        for variant in BASELINES[self.run.device]:
            batch, took = BATCH if variant == BATCHES else 1, {}
            for name in ("eager",) if variant == PUBLISHED else IMPLEMENTATIONS[self.run.device]:
                self.passes(batch, 5, name, batch)
                found = self.passes(max(2 * batch, self.amounts.passes // 2), 6, name, batch)
                if "unavailable" in found:
                    results.step("experts not available", experts=name, why=found["unavailable"])
                else:
                    took[name] = found["seconds"] / found["candidates"]
            self.fastest[variant] = min(took, key=took.__getitem__)
            results.step("transformers", variant=variant, **{name: round(value, 5) for name, value in took.items()})


def row_of(sides: Sides, kind: str, variant: str, found: Row, **more: Any) -> Row:
    """One line of the results."""
    on_gpu = sides.run.device == "cuda"
    about: Row = {"model": NAMES[sides.key], "mode": sides.run.shown_mode} if on_gpu else sides.setting._asdict()
    rate = sides.rate(found)
    return {
        **about,
        "kind": kind,
        "variant": variant,
        **more,
        "candidates": found["candidates"],
        "seconds": round(found["seconds"], 4),
        "cpu_seconds": round(found["cpu_seconds"], 3),
        "candidates_per_s": round(rate, 2),
        "tokens": found.get("tokens", ""),
        "computed_tokens": found.get("computed", ""),
        "note": found.get("note", ""),
    }


def keep_rate(setting: Setting, results: Results, number: int, found: Row) -> None:
    """One line of the results: the rate of matrix products, in the same seconds as the candidates'."""
    rate = found["operations"] / found["cpu_seconds" if setting.threads == 1 else "seconds"] / 1e9
    about = {**setting._asdict(), "kind": "rate", "variant": f"product of {MATRIX} x {MATRIX} matrices", "round": number}
    times = {name: round(found[name], 3) for name in ("seconds", "cpu_seconds")}
    results.row(**about, **times, matrix_gflop_s=round(rate, 1))
    results.step("rate", **setting._asdict(), gflop_s=round(rate, 1))


def rates(run: Run, settings: Sequence[Setting], results: Results) -> None:
    """The rate of matrix products alone, all settings in each round."""
    children = [start("rate", "olmoe", run.scratch, run, setting, results.log) for setting in settings]
    for child in children:
        child.read(run.left)
    for number in common.rounds(run.rounds, run.deadline):
        for setting, child in zip(settings, children, strict=True):
            keep_rate(setting, results, number, child.ask(run.left))
    for child in children:
        child.close()


def compare(sides: Sides, results: Results) -> dict[str, float]:
    """Rounds until the time for them is up; returns each variant's median rate."""
    run, columns = sides.run, BASELINES[sides.run.device]
    for variant in sides.variants:
        sides.measure(variant, 7)
    rates: dict[str, list[float]] = {variant: [] for variant in sides.variants}
    # On a GPU a third of what is left belongs to the whole attempt and RoSais.
    until = run.deadline - (run.left / 3 if run.on_gpu else 0)
    for number in common.rounds(1 if run.rehearse else run.rounds, until):
        if run.device == "cpu":
            keep_rate(sides.setting, results, number, sides.baseline.ask(run.left, do="rate"))
        found = {variant: sides.measure(variant, 1000 * (number + 1)) for variant in common.rotated(sides.variants, number)}
        rate = {variant: sides.rate(one) for variant, one in found.items()}
        for variant in sides.variants:
            rates[variant].append(rate[variant])
            ratios = {column: round(rate[variant] / rate[name], 3) for name, column in columns.items()}
            results.row(**row_of(sides, "speed", variant, found[variant], round=number, **ratios))
        results.step("round", number=number, **{variant: round(value, 1) for variant, value in rate.items()})
    return {variant: statistics.median(values) for variant, values in rates.items() if values}


def whole(sides: Sides, results: Results, medians: dict[str, float]) -> None:
    """A whole attempt, and on a GPU RoSais, beside what transformers would take for as many passes."""
    run, amounts = sides.run, sides.amounts

    def keep(kind: str, variant: str, found: Row, rates: dict[str, float], **more: Any) -> None:
        if run.device == "cuda":
            slow = {name: found["candidates"] / rates[name] for name in (PUBLISHED, FASTEST)}
            more |= {BASELINES["cuda"][name]: round(took / found["seconds"], 2) for name, took in slow.items()}
            more["transformers_seconds"] = round(slow[PUBLISHED], 2)
        results.row(**row_of(sides, kind, variant, found, **more))
        results.step(kind, variant=variant, seconds=round(found["seconds"], 3), **more)

    length = 6 if run.rehearse else amounts.prompt
    sizes = {"in_flight": 1, "cells": None, "length": length, "min_gain": amounts.min_gain, "answer": amounts.answer}
    s1, s2 = (2, 4) if run.rehearse else (S1, S2)
    if run.device == "cpu":
        for way in WAYS:
            found = sides.engine.ask(run.left, do="rosais", length=length, seed=50, s1=s1, s2=s2, way=way)
            keep("whole run", f"RoSais, S1 = {s1}, then S2 = {s2} masks of a layer; {way}", found, medians)
        # The longest last: what the time does not suffice for is left out.
        for strategy, way in itertools.product(("adaptive", "code", "paper"), WAYS):
            found = sides.engine.ask(run.left, do="attempts", seed=77, way=way, strategy=strategy, **sizes)
            keep("whole run", f"F-SOUR, {strategy}; {way}", found, medians)
        return
    found = sides.engine.ask(run.left, do="attempts", seed=77, **sizes)
    keep("whole run", f"{length} prompt tokens", found, medians)
    # One scored token a pass here: the baseline is timed on such passes of its own.
    short = {name: sides.rate(sides.passes(amounts.passes, 9, sides.fastest[name], target=1)) for name in (PUBLISHED, FASTEST)}
    sides.engine.ask(run.left, do="rosais", length=amounts.prompt, seed=40, s1=2, s2=2)
    found = sides.engine.ask(run.left, do="rosais", length=amounts.prompt, seed=50, s1=s1, s2=s2)
    variant = f"S1 = {s1}, every layer; S2 = {s2}, one layer"
    keep("rosais", variant, found, short, rosais_seconds=round(found["rosais_seconds"], 4))


def make_folder(key: str, run: Run, setting: Setting) -> Path:
    """The model; a GPU's has no weights."""
    dtype = setting.dtype if run.size == "cpu" else None
    return make_model(run.scratch / f"search-{key}-{setting.dtype}", config_of(key, run.size), dtype)


def measure_model(key: str, run: Run, setting: Setting, results: Results, agreed: bool) -> None:
    """Check, then time everything of one model.

    Raises:
        ChildFailed: the sides disagree, or one ended or was too slow; what was measured stays.

    """
    folder = make_folder(key, run, setting)
    children: list[Child] = []
    try:
        children += [start(kind, key, folder, run, setting, results.log) for kind in ("transformers", "engine")]
        baseline, engine = children
        sides = Sides(key, run, setting, engine, baseline, {})
        if not agreed:  # while the others start
            env = common.engine_environment(run, v2=False) | common.EXACT_FLOAT32
            children.append(Child(__file__, "agreement", agreement_options(key, run), results.log, env))
            results.step("scores agree", model=key, **children[-1].read(run.left))
            children.pop().close()
        for child in children:
            child.read(run.left)
        results.step("both ready", model=key)
        if run.size == "cpu":
            check_scores(sides, results)
        sides.choose(results)
        whole(sides, results, compare(sides, results))
    finally:
        for child in children:
            child.close()


def check_scores(sides: Sides, results: Results) -> None:
    """The model that is timed, too, where both sides have its weights.

    Raises:
        SystemExit: the sides differ.

    """
    run, config = sides.run, config_of(sides.key, sides.run.size)
    from vllm_unsafe_routes import ModelShape

    length, last = sides.amounts.prompt, config["vocab_size"] - 8
    asked = {"prompt": token_ids(1, length, last), "target": token_ids(2, TARGET, last)}
    asked["forced"] = candidates(ModelShape.from_hf_config(config), BATCH, 3, length)  # type: ignore[assignment]
    scores = [sides.engine.ask(run.left, do=do, **asked) for do in ("score", "cells")]
    scores += [sides.baseline.ask(run.left, do="score", batch=batch, **asked) for batch in (1, BATCH)]
    try:
        worst = furthest(scores, TOLERANCE[sides.setting.dtype])
    except AssertionError as error:
        raise SystemExit(str(error)) from None
    note = f"largest difference of scores {worst:.2e} nats ({sides.setting.dtype})"
    results.row(**sides.setting._asdict(), kind="check", variant="all", candidates=BATCH, note=note)
    results.step("scores agree", note=note)


def memory(run: Run, results: Results, long: bool) -> None:
    """Peak memory over the number of candidates."""
    counts = [20, 200] if run.rehearse else [1_000, 100_000, *([1_000_000] if long else [])]
    child = Child(
        __file__, "memory", {"name": "lab", "warm_up": 20 * counts[0]}, results.log, common.engine_environment(run, v2=False)
    )
    whose = child.read(run.left)
    for count in counts:
        found = child.ask(run.left, count=count)
        peak, in_use = round(found["peak"], 1), round(found["in_use"], 1)
        rate = round(found["candidates"] / found["cpu_seconds"], 2)
        times = {name: round(found[name], 3) for name in ("seconds", "cpu_seconds")}
        about = {"kind": f"memory, {whose}", "threads": 1, "variant": "cells, lab model", "candidates": count}
        results.row(**about, **times, candidates_per_s=rate, peak_rss_mib=peak, in_use_mib=in_use)
        results.step("memory", candidates=count, peak_mib=peak, in_use_mib=in_use, candidates_per_s=rate)
    child.close()


def profile(run: Run, log: Path) -> None:
    """Print where the engine's time goes: shares with few and with many prompts in flight, then functions with 16."""
    setting = Setting(1, "bfloat16")
    engine, amounts = start("engine", "olmoe", make_folder("olmoe", run, setting), run, setting, log), AMOUNTS["cpu"]
    engine.read(run.left)
    sizes = {"length": amounts.prompt, "min_gain": amounts.min_gain}
    engine.ask(run.left, do="attempts", in_flight=2, cells=4, seed=7, **sizes)
    for in_flight in PROFILED:
        cells = CELLS_OF_A_PROMPT * in_flight
        parts = engine.ask(run.left, do="python_of", in_flight=in_flight, cells=cells, seed=505, **sizes)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
        print(f"{in_flight} in flight, CPU milliseconds a candidate: {shown}", flush=True)
    found = engine.ask(run.left, do="profiled", in_flight=16, cells=amounts.cells["cells"][16], seed=5, **sizes)
    engine.close()
    print(f"{found['candidates']} candidates in {found['seconds']:.1f} s; {found['computed']} of {found['tokens']} tokens computed")
    for name, own, cumulative in found["rows"]:
        print(f"{100 * own / found['cpu_seconds']:6.2f}% own {100 * cumulative / found['cpu_seconds']:6.2f}% with callees  {name}")


# Tables.


def cpu_table(rows: Rows) -> str:
    """Medians over rounds."""
    timed, bounds, lines = [row for row in rows if row["kind"] == "speed"], bounds_of(rows), []
    if not timed:
        return NOT_MEASURED
    for setting in dict.fromkeys(map(setting_of, timed)):
        for variant in common.distinct(timed, "variant"):
            mine = [row for row in timed if setting_of(row) == setting and row["variant"] == variant]
            if not mine:
                continue
            names = ("candidates_per_s", "ratio_to_one_by_one", "ratio_to_batches")
            columns = {name: [float(row[name]) for row in mine] for name in names}
            share = sum(int(row["computed_tokens"]) for row in mine) / sum(int(row["tokens"]) for row in mine)
            reached = statistics.median(columns["candidates_per_s"]) / bounds[setting] if setting in bounds else None
            middle = [*(common.spread(values, 1, 1) for values in columns.values()), f"{100 * share:.0f}%"]
            shown = NOT_MEASURED if reached is None else f"{100 * reached:.0f}%"
            lines.append([variant, setting.dtype, setting.threads, *middle, shown])
    header = ["what scores the candidates", "weights", "threads", "candidates/s", "against one by one", "against batches of 64"]
    table = common.markdown([*header, "tokens computed", "share of the bound"], lines)
    return f"{table}\n\n{whole_runs(rows)}\n\n{cpu_note(rows, timed, bounds)}"


def setting_of(row: Row) -> Setting:
    """Of a row, also one of a CSV file."""
    return Setting(int(row["threads"]), str(row["dtype"]))


def operations() -> float:
    """Of what differs between the candidates of a cell."""
    return differing_operations(sizes_of(config_of("olmoe", "cpu")), AMOUNTS["cpu"].prompt, TARGET)


def bounds_of(rows: Rows) -> dict[Setting, float]:
    """Candidates a second if only what differs between them was computed, at the rate of large matrix products."""
    found: dict[Setting, list[float]] = {}
    for row in rows:
        if row["kind"] == "rate":
            found.setdefault(setting_of(row), []).append(float(row["matrix_gflop_s"]))
    return {setting: 1e9 * statistics.median(values) / operations() for setting, values in found.items()}


def cpu_note(rows: Rows, timed: Rows, bounds: dict[Setting, float]) -> str:
    """What the figures cannot be read without."""
    first, amounts = timed[0], AMOUNTS["cpu"]
    note = (
        f"A second is one of CPU time with one thread, of the wall clock with more. Median and range of "
        f"{max(int(row['round']) for row in timed) + 1} rounds over cells spread evenly over whole F-SOUR "
        f"runs ({amounts.prompt} prompt and {TARGET} target tokens, {DRAWS} draws a cell); {first['device']}, vLLM "
        f"{first['vllm']}, torch {first['torch']}, transformers {first['transformers']}, {first['date']}, commit {first['commit']}."
    )
    if bounds:
        each = (
            f"{bound:.0f} candidates/s in {dtype} with {threads} thread{'s' * (threads > 1)}"
            for (threads, dtype), bound in bounds.items()
        )
        note += (
            f" The bound is what torch's product of {MATRIX} x {MATRIX} matrices reaches, over the {operations() / 1e9:.2f} GFLOP "
            f"that differ between the candidates of a cell (`differing_operations` in benchmarks/shapes.py): {', '.join(each)}."
        )
    return note + "".join(memory_note(rows, kind) for kind in common.distinct(rows, "kind") if kind.startswith("memory"))


def memory_note(rows: Rows, kind: str) -> str:
    """Peak memory with one allocator."""
    flat = (
        f"{int(row['candidates']):,} candidates {float(row['peak_rss_mib']):.0f} ({float(row['in_use_mib']):.0f}) MiB"
        for row in rows
        if row["kind"] == kind
    )
    what = f"Peak {kind}, of a stream on the lab model (in brackets: what is left when glibc gives back what is free)"
    return f" {what}: {', '.join(flat)}."


def whole_runs(rows: Rows) -> str:
    """CPU seconds of whole searches, as requests and as cells."""
    mine = [row for row in rows if row["kind"] == "whole run" and setting_of(row) == (1, "bfloat16")]
    took = {row["variant"]: float(row["cpu_seconds"]) for row in mine}
    lines = [
        [name, row["candidates"], *(f"{took[f'{name}; {way}']:.1f}" for way in WAYS)]
        for name, row in {row["variant"].split("; ")[0]: row for row in mine}.items()
        if all(f"{name}; {way}" in took for way in WAYS)
    ]
    return common.markdown(["a whole run of one prompt", "candidates", "as requests, CPU s", "as cells, CPU s"], lines)


def gpu_table(rows: Rows) -> str:
    """Rates, then whole attempts and RoSais."""
    timed, lines, single = [row for row in rows if row["kind"] == "speed"], [], []
    for model in common.distinct(timed, "model"):
        for variant in common.distinct(timed, "variant"):
            mine = [row for row in timed if (row["model"], row["variant"]) == (model, variant)]
            names = ("candidates_per_s", "ratio_to_published", "ratio_to_fastest")
            lines.append([model, variant, *(common.spread([float(row[name]) for row in mine], 1, 1) for name in names)])
    for row in rows:
        if row["kind"] in ("rosais", "whole run"):
            name = {"rosais": "RoSais", "whole run": "whole F-SOUR attempt"}[row["kind"]]
            cells = [row[column] for column in ("seconds", "candidates", "transformers_seconds", "ratio_to_published")]
            single.append([row["model"], f"{name}, {row['variant']}", *cells])
    rates = common.markdown(["model", "what", "candidates/s", "against the published way", "against its fastest experts"], lines)
    wholes = common.markdown(["model", "what", "seconds", "candidates", "transformers, seconds", "ratio"], single)
    return f"{rates}\n\n{wholes}\n\nEngine mode: {', '.join(common.distinct(rows, 'mode'))}. {common.where(rows)}"


def main() -> int:
    options = common.parser(__doc__, rounds=3)
    options.add_argument("--threads", default="1", help="numbers of OpenMP threads on CPU, the same for all variants (default: 1)")
    options.add_argument("--dtypes", default="bfloat16", help="of the weights on CPU: bfloat16, float32 (default: bfloat16)")
    options.add_argument("--agreed", action="store_true", help="the sides were seen to agree: start with the timing")
    options.add_argument("--memory", action="store_true", help="measure peak memory instead")
    options.add_argument("--long", action="store_true", help="with --memory: also one million candidates")
    options.add_argument("--profile", action="store_true", help="profile the engine instead")
    options.add_argument("--rate", action="store_true", help="measure the rate of matrix products alone, which every round has too")
    args: argparse.Namespace = options.parse_args()
    run = common.run_of(args)
    results, failed = Results(run, "search_speed"), []
    if args.profile:
        profile(run, results.log)
        return 0
    if args.memory:
        memory(run, results, args.long)
        return 0
    # A rehearsal has an exact comparison to make, which bfloat16 has not.
    settings = [Setting(1, "float32" if run.rehearse else "bfloat16")]
    if run.device == "cpu" and not run.rehearse:
        settings = [Setting(int(threads), dtype) for dtype in args.dtypes.split(",") for threads in args.threads.split(",")]
    if args.rate:
        rates(run, settings, results)
        return 0
    for key in run.models:
        for setting in settings:
            try:
                measure_model(key, run, setting, results, args.agreed)
            except ChildFailed as error:
                results.step("model failed", model=key, error=str(error))
                failed.append(key)
    if results.rows and not run.rehearse:
        print((cpu_table if run.device == "cpu" else gpu_table)(results.rows))
    return 1 if failed else 0


CHILDREN = {
    "engine": serve_engine,
    "transformers": serve_transformers,
    "agreement": agreement,
    "memory": serve_memory,
    "rate": serve_rate,
}
if __name__ == "__main__":
    if not common.serve_child(CHILDREN):
        sys.exit(main())
