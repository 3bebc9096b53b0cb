"""How long one gating launch takes: the directed kernel, vLLM's native kernels and torch, on a GPU.

A contestant is checked against the reference before it is timed; a wrong one is not timed and fails the run. A time is that of a
CUDA graph of many launches, divided by their number; each launch has its own input, and the L2 cache is overwritten before each
replay, so logits come from memory. Contestants take turns within a round, in rotating order. The floor is the larger of an empty
kernel's time and of the bytes over the bandwidth of a large copy, both measured in this run.

    python benchmarks/kernel_speed.py --device cuda --only OLMoE,DeepSeek-V2-Lite,Mixtral,DeepSeek-V3
    python benchmarks/kernel_speed.py --device cuda                     # all gatings
    python benchmarks/kernel_speed.py --rehearse                        # tiny batches, the kernel interpreted; checks, no times
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import NOT_MEASURED, Results, Row, Rows, distinct, markdown, parser, rotated, run_of, where

if TYPE_CHECKING:
    from kernel_peers import Contestant, Problem, Routes, Shape

NUM_TOKENS = (1, 32, 256, 4096, 16384)
TINY_NUM_TOKENS = (1, 3)
ROUNDS = 21
MAX_LAUNCHES, MIN_LAUNCHES = 200, 20
MAX_LOGITS_BYTES = 1 << 30
WRONG = "wrong: "
NATIVE = ("vllm topk_softmax", "vllm topk_sigmoid", "vllm grouped_topk")
SHOWN = (
    "ours, no table",
    "ours, no directed token",
    "ours, all masked",
    "ours, all forced",
    "ours behind native, no directed token",
    "ours behind native, routes kept",
    "ours behind native, all masked, routes kept",
)


@dataclass(frozen=True, slots=True)
class Floors:
    """What no kernel beats here, measured in this run.

    Attributes:
        copy_gb_s: bandwidth of a copy of 1 GiB, reads and writes counted.
        launch_us: an empty kernel within a graph of empty kernels.

    """

    copy_gb_s: float
    launch_us: float


class Replay:
    """A CUDA graph of `num_launches` calls of `call(slot)`."""

    def __init__(self, call: Callable[[int], Any], num_launches: int) -> None:
        import torch

        self.num_launches = num_launches
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and allocates what capture must not
            for _ in range(3):
                call(0)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for slot in range(num_launches):
                call(slot)
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def microseconds(self) -> float:
        """One launch's share of one replay."""
        self._start.record()
        self.graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3 / self.num_launches


def measure_floors() -> Floors:
    """The floors of this device."""
    import torch
    import triton

    @triton.jit
    def empty_kernel():  # type: ignore[no-untyped-def]
        pass

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = Replay(lambda slot: target.copy_(source), 5)
    empty = Replay(lambda slot: empty_kernel[(1,)](), MAX_LAUNCHES)
    copy_us = statistics.median(copy.microseconds() for _ in range(ROUNDS))
    return Floors(2 * source.numel() / copy_us / 1e3, statistics.median(empty.microseconds() for _ in range(ROUNDS)))


def prepare(problem: Problem, contestant: Contestant) -> tuple[Callable[[int], Routes] | None, str]:
    """The checked call, or None with a note of why there is none."""
    from kernel_peers import Unavailable, check

    try:
        call = contestant.prepare(problem)
        if not contestant.exact_ids:
            call(0)
    except Unavailable as reason:
        return None, f"peer not available: {reason}"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        # Another release's operator, with another signature or none.
        return None, f"peer not available: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    try:
        check(problem, contestant, call)
    except AssertionError as error:
        return None, f"{WRONG}{error}"
    return call, ""


def measure(shape: Shape, num_tokens: int, floors: Floors | None, results: Results) -> None:
    """Check, then time, everybody who does this gating; a row each."""
    from kernel_peers import CONTESTANTS, bytes_per_launch, make_problem

    of_launch = num_tokens * shape.spec.num_experts * 2
    num_launches = 2 if floors is None else max(MIN_LAUNCHES, min(MAX_LAUNCHES, MAX_LOGITS_BYTES // of_launch))
    problem = make_problem(shape, num_tokens, num_launches, "cpu" if floors is None else "cuda")
    taking_part = [one for one in CONTESTANTS if one.applies(shape.spec)]
    calls, notes = {}, {}
    for contestant in taking_part:
        calls[contestant.name], notes[contestant.name] = prepare(problem, contestant)
    times: dict[str, list[float]] = {name: [] for name in calls}
    if floors is not None:
        times |= take_turns({name: Replay(call, num_launches) for name, call in calls.items() if call is not None})
    for contestant in taking_part:
        found = figures(times[contestant.name], bytes_per_launch(problem, contestant), floors)
        about = {"shape": shape.label, "num_tokens": num_tokens, "variant": contestant.name}
        results.row(**about, **found, note=notes[contestant.name])


def take_turns(replays: dict[str, Replay]) -> dict[str, list[float]]:
    """Microseconds a launch by round."""
    import torch

    junk = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(-2, ROUNDS):
        for name in rotated(list(replays), number):
            junk.zero_()
            took = replays[name].microseconds()
            if number >= 0:
                times[name].append(took)
    return times


def figures(times: list[float], num_bytes: int, floors: Floors | None) -> Row:
    """A row's columns."""
    names = ("us_median", "us_iqr", "gb_s", "copy_gb_s", "launch_floor_us", "floor_us", "times_the_floor")
    found: Row = dict.fromkeys(names, NOT_MEASURED)
    if floors is None or not times:
        return found
    median, quarters = statistics.median(times), statistics.quantiles(times, n=4)
    floor = max(floors.launch_us, num_bytes / floors.copy_gb_s / 1e3)
    values = (
        median,
        quarters[2] - quarters[0],
        num_bytes / median / 1e3,
        floors.copy_gb_s,
        floors.launch_us,
        floor,
        median / floor,
    )
    return {name: round(value, 3) for name, value in zip(names, values, strict=True)}


# Tables.


def medians_of(rows: Rows) -> dict[tuple[str, int, str], float]:
    """(shape, tokens, variant) -> microseconds."""
    timed = [row for row in rows if row["us_median"] != NOT_MEASURED]
    return {(row["shape"], int(row["num_tokens"]), row["variant"]): float(row["us_median"]) for row in timed}


def table(rows: Rows) -> str:
    """Medians of all variants, with the floor of the kernel without directed tokens."""
    medians = medians_of(rows)
    if not medians:
        return NOT_MEASURED
    floors = {(row["shape"], int(row["num_tokens"])): row["floor_us"] for row in rows if row["variant"] == SHOWN[1]}
    shown = [name for name in SHOWN if any(key[2] == name for key in medians)]
    lines = []
    for shape in distinct(rows, "shape"):
        for num_tokens in map(int, distinct([row for row in rows if row["shape"] == shape], "num_tokens")):
            cells = [medians.get((shape, num_tokens, variant), "") for variant in shown]
            native = [f"{medians[key]} ({name})" for name in NATIVE if (key := (shape, num_tokens, name)) in medians]
            lines.append([shape, num_tokens, floors.get((shape, num_tokens), ""), *cells, "; ".join(native)])
    row = next(row for row in rows if row["us_median"] != NOT_MEASURED)
    note = (
        f"Microseconds a launch, median of {ROUNDS} rounds. {where(rows)} Measured in the same run: copy {row['copy_gb_s']} GB/s, "
        f"empty kernel {row['launch_floor_us']} µs."
    )
    missing = dict.fromkeys(f"\n- {row['variant']}: {row['note']}" for row in rows if row.get("note"))
    return f"{markdown(['shape', 'tokens', 'floor', *shown, 'vLLM native'], lines)}\n\n{note}{''.join(missing)}"


def short_table(rows: Rows) -> str:
    """Ours against vLLM's native gating; all of it is in docs/kernels.md."""
    medians, lines = medians_of(rows), []
    for shape, num_tokens in dict.fromkeys((row["shape"], int(row["num_tokens"])) for row in rows):
        native = [medians[key] for name in NATIVE if (key := (shape, num_tokens, name)) in medians]
        ours = [medians.get((shape, num_tokens, variant)) for variant in (SHOWN[1], SHOWN[2], SHOWN[3])]
        if native and None not in ours:
            cells = [f"{value} ({value / min(native):.2f})" for value in ours if value is not None]
            lines.append([shape, num_tokens, min(native), *cells])
    header = ["shape", "tokens", "vLLM native, µs", "no directed token (ratio)", "all masked", "all forced"]
    return f"{markdown(header, lines)}\n\n{where(rows)}" if lines else NOT_MEASURED


def main() -> int:
    options = parser(__doc__)
    run = run_of(options.parse_args())
    if not run.on_gpu and not run.rehearse:
        options.error("a time measured on CPU would say nothing; --rehearse checks everything else")
    if run.rehearse:
        # Read when a kernel module is imported.
        os.environ |= {"TRITON_INTERPRET": "1", "VLLM_UNSAFE_ROUTES_KERNEL": "triton"}
    from kernel_peers import SHAPES

    results = Results(run, "kernel_speed")
    floors = measure_floors() if run.on_gpu else None
    results.step("floors", **({} if floors is None else {"copy_gb_s": floors.copy_gb_s, "launch_us": floors.launch_us}))
    missing = []
    shapes = {shape.name: shape for shape in SHAPES}
    for shape in map(shapes.__getitem__, run.wanted(shapes)):
        for num_tokens in TINY_NUM_TOKENS if run.rehearse else NUM_TOKENS:
            if time.monotonic() > run.deadline:
                missing.append(f"{shape.label}, {num_tokens} tokens")
                continue
            measure(shape, num_tokens, floors, results)
        results.step("shape ends", shape=shape.label)
    wrong = [f"{row['shape']}, {row['num_tokens']} tokens: {row['note']}" for row in results.rows if row["note"].startswith(WRONG)]
    results.step("done", no_time_for="; ".join(missing) or "nothing", wrong="; ".join(wrong) or "none")
    if not run.rehearse:
        print(short_table(results.rows))
    return 1 if missing or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
