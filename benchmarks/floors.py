"""How close to the limit a forward pass is: floors from operations and bytes, measured time over them, and what the rest is.

Two ceilings are measured first: a large copy (bytes read and written) and a large bfloat16 matrix product. Then, per model, three
workloads on one engine with overrides: steady decode of 32 requests with a plan each, one prefill step, and scoring of F-SOUR
candidates. A workload is timed without the profiler and profiled once more for its share by kind of kernel. docs/gpu.md has the
arithmetic.

    python benchmarks/floors.py --device cuda --models olmoe,deepseek_v2_lite
    python benchmarks/floors.py --rehearse
"""

from __future__ import annotations

import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import common
from common import Child, ChildFailed, Results, Row, Rows, Run, Talk
from shapes import NAMES, Ceilings, Forward, Sizes, config_of, floors_of, make_model, sizes_of

# The first pattern that a kernel's name matches says what it is for.
KINDS = (
    ("route control", r"route_topk_kernel|fill_row_index|unsafe_routes"),
    ("experts", r"fused_moe|moe_sum|moe_align|count_and_sort|act_and_mul|silu|batched_mm|grouped"),
    ("routing", r"topk|gating"),
    ("attention", r"flash|fmha|attn|attention|mla|reshape_and_cache|rotary|concat_and_cache"),
    ("dense matrices", r"gemm|gemv|cublas|nvjet|cutlass|xmma|splitk|addmm|linear|matmul|\bmm\b"),
    ("norms, copies, sampling", r"."),
)
WORKLOADS = ("decode", "prefill", "search")
Measure = Callable[[Callable[[], None]], Any]


def kind_of(name: str) -> str:
    """What a kernel or operator is for."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def measure_ceilings(options: dict[str, Any]) -> Talk:
    """Child: copy bandwidth and matrix rate, medians."""
    import torch

    tiny = options["rehearse"]
    device = "cpu" if tiny else "cuda"
    wait: Callable[[], None] = (lambda: None) if tiny else torch.cuda.synchronize

    def median(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(13):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[3:])

    size = 1 << (20 if tiny else 32)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / median(lambda: target.copy_(source))
    side = 128 if tiny else 8192
    # Random data: zeros run faster than any real matrix.
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield asdict(Ceilings(copied, 2 * side**3 / median(lambda: left @ right)))


class Engine:
    """An engine with overrides and the three workloads on it.

    Args:
        options: the child's settings.

    """

    def __init__(self, options: dict[str, Any]) -> None:
        common.support_path()
        self.tiny = options["rehearse"]
        if self.tiny:
            import engines  # noqa: F401 - the environment of CPU engines
        from vllm import LLM

        from vllm_unsafe_routes import ModelShape
        from vllm_unsafe_routes.search.scorer import RouteScorer

        self.shape, self.last = ModelShape.from_hf_config(options["config"]), options["config"]["vocab_size"] - 8
        llm = LLM(options["folder"], **options["settings"], additional_config={"unsafe_routes": {"allow_overrides": True}})
        self.engine, self.scorer, self.rng = llm.llm_engine, RouteScorer(llm), random.Random(0)
        self._numbers = iter(range(1 << 30))

    def tokens(self, length: int) -> list[int]:
        """Made-up ones."""
        return [self.rng.randrange(3, self.last) for _ in range(length)]

    def add(self, length: int, new: int) -> None:
        """A request with a plan."""
        from vllm import SamplingParams, TokensPrompt

        from vllm_unsafe_routes import RoutePlan

        experts = self.rng.sample(range(self.shape.num_experts), self.shape.top_k)
        plan = RoutePlan().disable(self.shape.moe_layers[0], "all", [1, 2]).force(self.shape.moe_layers[-1], [1], experts)
        asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(**asked, extra_args=plan.extra_args())
        self.engine.add_request(f"floor-{next(self._numbers)}", TokensPrompt(prompt_token_ids=self.tokens(length)), params)

    def drain(self) -> None:
        """Until nothing is left to do."""
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def decode(self, measure: Measure) -> tuple[Any, Forward, int]:
        """Steady decoding; returns what was measured, a step's work, and the number of steps."""
        count, context, steps = (2, 12, 4) if self.tiny else (32, 512, 48)
        for _ in range(count):
            self.add(context, steps + 12)
        for _ in range(8):  # prompts, then a few steps of steady decoding
            self.engine.step()

        def run() -> None:
            for _ in range(steps):
                self.engine.step()

        found = measure(run)
        self.drain()
        # Contexts in the middle of the steps.
        keys = count * (context + 8 + steps // 2)
        return found, Forward(count, count, keys, keys), steps

    def prefill(self, measure: Measure) -> tuple[Any, Forward, int]:
        """One step of prompts."""
        count, length = (2, 16) if self.tiny else (8, 1024)
        for _ in range(count):
            self.add(length, 1)
        return measure(self.drain), Forward(count * length, count, count * length * (length + 1) // 2, 0), 1

    def search(self, measure: Measure) -> tuple[Any, Forward, int]:
        """Scoring candidates; of one only what follows its change is computed, and its keys are all of its tokens."""
        from vllm_unsafe_routes import RoutePlan

        count, length, target, draws = (2, 12, 4, 4) if self.tiny else (16, 28, 16, 10)
        items = []
        for prompt, wanted in [(self.tokens(length), self.tokens(target)) for _ in range(count)]:
            for _ in range(draws):
                layer, position = self.rng.choice(self.shape.moe_layers), self.rng.randrange(length)
                experts = self.rng.sample(range(self.shape.num_experts), self.shape.top_k)
                items.append((prompt, wanted, RoutePlan().force(layer, [position], experts)))
        before = self.scorer.stats.computed_tokens
        found = measure(lambda: [*self.scorer.score_many(items)].clear())
        computed, whole = self.scorer.stats.computed_tokens - before, length + target - 1
        return found, Forward(computed, len(items) * (target + 1), computed * whole, len(items) * whole), 1

    def timed(self, call: Callable[[], None]) -> float:
        """Seconds."""
        import torch

        wait: Callable[[], None] = (lambda: None) if self.tiny else torch.cuda.synchronize
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    def profiled(self, call: Callable[[], None]) -> dict[str, float]:
        """Seconds by kernel (on CPU by operator)."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] if self.tiny else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as recorded:
            self.timed(call)
        totals: dict[str, float] = {}
        for event in recorded.key_averages():
            took = event.self_cpu_time_total if self.tiny else event.self_device_time_total
            if took and (self.tiny or event.device_type.name == "CUDA"):
                totals[event.key] = totals.get(event.key, 0.0) + took / 1e6
        return totals


def serve_engine(options: dict[str, Any]) -> Talk:
    """Child: runs a workload when told to."""
    engine = Engine(options)
    command = yield "ready"
    while True:
        workload = getattr(engine, command["workload"])
        workload(engine.timed)
        seconds = statistics.median(workload(engine.timed)[0] for _ in range(1 if engine.tiny else 5))
        kernels, forward, number = workload(engine.profiled)
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:40]
        found = {"seconds": seconds / number, "kernels": {name: took / number for name, took in longest}}
        command = yield {**found, "forward": asdict(forward)}


def analyse(found: Row, sizes: Sizes, ceilings: Ceilings, rehearse: bool) -> Row:
    """Floor, time over it, and the rest by kind: measured time of the kind less its own floor."""
    forward = Forward(**found["forward"])
    floors = floors_of(sizes, forward, ceilings)
    floor, seconds = sum(floors.values()), found["seconds"]
    by_kind: dict[str, float] = {}
    for name, took in found["kernels"].items():
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + took
    busy = sum(by_kind.values())
    if not rehearse:
        by_kind["no kernel running"] = max(0.0, seconds - busy)
    rest = {kind: took - floors.get(kind, 0.0) for kind, took in by_kind.items()}
    largest = max(rest, key=rest.__getitem__) if rest else "unknown"
    return {
        "floor_ms": round(floor * 1e3, 4),
        "measured_ms": round(seconds * 1e3, 4),
        "times_the_floor": round(seconds / floor, 3),
        "largest_rest": largest,
        "largest_rest_ms": round(rest.get(largest, 0.0) * 1e3, 4),
        **{f"{kind}, floor ms": round(value * 1e3, 4) for kind, value in floors.items()},
        **{f"{kind}, ms": round(value * 1e3, 4) for kind, value in by_kind.items()},
        "top_kernels": "; ".join(f"{name[:60]} {took * 1e3:.4f} ms" for name, took in list(found["kernels"].items())[:8]),
    }


def table(rows: Rows) -> str:
    """Floor, time over it, largest rest."""
    cells = ("model", "workload", "floor_ms", "measured_ms", "times_the_floor")
    timed = [row for row in rows if row["kind"] == "workload"]
    lines = [[*(row[name] for name in cells), f"{row['largest_rest']}: {row['largest_rest_ms']} ms"] for row in timed]
    shown = common.markdown(
        ["model", "workload", "floor, ms", "measured, ms", "times the floor", "largest part of the rest"], lines
    )
    ceilings = [row for row in rows if row["kind"] == "ceilings"][-1]
    limits = f"copy {ceilings['copy_gb_s']} GB/s, matrix {ceilings['matrix_tflop_s']} TFLOP/s"
    return f"{shown}\n\nMeasured ceilings: {limits}. {common.where(rows)}"


def run_model(key: str, ceilings: Ceilings, run: Run, results: Results) -> None:
    """All workloads of a model.

    Raises:
        ChildFailed: the engine ended or was too slow; what was measured stays.

    """
    config = config_of(key, run.size)
    folder = make_model(run.scratch / f"floors-{key}", config)
    settings = common.engine_settings(run, 6 * common.GIB, load_format="dummy", max_num_seqs=256 if run.on_gpu else 64)
    settings |= {"dtype": "bfloat16" if run.on_gpu else "float32", "max_model_len": 2048 if run.on_gpu else 256}
    settings["max_num_batched_tokens"] = 8192 if run.on_gpu else 1024
    about = {"name": key, "folder": str(folder), "config": config, "settings": settings, "rehearse": run.rehearse}
    child = Child(__file__, "engine", about, results.log, common.engine_environment(run, v2=False))
    try:
        child.read(run.left)
        results.step("engine ready", model=key)
        for workload in run.wanted(WORKLOADS):
            found = child.ask(run.left, workload=workload)
            row = analyse(found, sizes_of(config), ceilings, run.rehearse)
            about = {"kind": "workload", "model": NAMES[key], "mode": run.shown_mode, "workload": workload}
            results.row(**about, **row)
            results.step(workload, model=key, **{name: row[name] for name in ("floor_ms", "measured_ms", "largest_rest")})
    finally:
        child.close()


def main() -> int:
    run = common.run_of(common.parser(__doc__).parse_args(), "olmoe,deepseek_v2_lite")
    results, failed = Results(run, "floors"), []
    if not run.on_gpu and not run.rehearse:
        raise SystemExit("the floors are those of a GPU; --rehearse runs every step on CPU")
    child = Child(__file__, "ceilings", {"rehearse": run.rehearse}, results.log, common.engine_environment(run, v2=False))
    ceilings = Ceilings(**child.read(run.left))
    child.close()
    copy, matrix = round(ceilings.bytes_per_s / 1e9, 1), round(ceilings.flops_per_s / 1e12, 2)
    results.row(kind="ceilings", copy_gb_s=copy, matrix_tflop_s=matrix)
    results.step("ceilings", copy_gb_s=copy, matrix_tflop_s=matrix)
    for key in run.models[:1] if run.rehearse else run.models:
        try:
            run_model(key, ceilings, run, results)
        except ChildFailed as error:
            results.step("model failed", model=key, error=str(error))
            failed.append(key)
    if not run.rehearse and len(results.rows) > 1:
        print(table(results.rows))
    return 1 if failed else 0


if __name__ == "__main__":
    if not common.serve_child({"ceilings": measure_ceilings, "engine": serve_engine}):
        sys.exit(main())
