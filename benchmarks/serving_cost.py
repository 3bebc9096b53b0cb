"""What route control costs in serving: throughput with this plugin against stock vLLM, turn by turn.

Variants: stock (the plugin is not loaded), idle (overrides enabled, none used), policy (some experts banned at every layer), bias
(a policy that biases experts of every layer, for all tokens), plans (a plan on every request: a mask on all tokens of two layers
and up to ten forced routes) and again (a second stock engine: what two engines of one kind differ by); on CPU also usage (expert
usage is counted, by a label too) and all (policy, plans and usage at once); on a GPU also fused (idle, with the route kernel in the
place of vLLM's gating) and eager (no plugin, but eager mode forced, as plugins that hook modules must). Each engine is a process of
its own; all of a group stay up and take turns on the same requests, in an order that rotates from round to round. "idle" and
"plans" are requests to one engine.

The figure is the ratio of throughputs of the quickest turns, because others' work only ever lengthens a turn; on a GPU the median
over the rounds stands beside it. On the CPU all engines are pinned to one core and timed in CPU seconds. Two processes of one kind
differ as well: on the CPU all engines start several times, each time in another order, and the median over the starts counts. What
differs between processes is left out of a second ratio: to the same engine, on the same requests without plans and labels, with
route control's work in a forward pass replaced by nothing; on a GPU the kernels that captured graphs hold stay.

    python benchmarks/serving_cost.py                               # CPU: the OLMoE shape with 8 layers, hidden size 512
    python benchmarks/serving_cost.py --device cuda --models olmoe  # published shape, dummy weights, CUDA graphs
    python benchmarks/serving_cost.py --against ../other-checkout   # both trees' packages in the same rounds
    python benchmarks/serving_cost.py --rehearse                    # tiny shape: checks only
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import common
from common import NOT_MEASURED, Child, ChildFailed, Results, Row, Rows, Run, Talk
from shapes import BYTES, NAMES, config_of, enliven, make_model, sizes_of, weight_bytes

Load = tuple[int, int, int]  # requests, prompt tokens, generated tokens
LOADS: dict[str, dict[str, Load]] = {
    "cpu": {"prefill-heavy": (16, 128, 1), "decode-heavy": (16, 16, 24)},
    # 5 and 33 requests are padded to a captured size of 8 and 64.
    "cuda": {
        "decode, 32 requests": (32, 32, 128),
        "decode, 5 requests": (5, 32, 128),
        "prefill": (32, 1024, 1),
        "decode, 33 requests": (33, 32, 128),
    },
}
TINY_LOADS: dict[str, dict[str, Load]] = {
    "cpu": {"prefill-heavy": (4, 24, 1), "decode-heavy": (4, 8, 6)},
    "cuda": {"decode, 3 requests": (3, 8, 4), "prefill": (2, 24, 1)},
}
VARIANTS = {
    "idle": "overrides enabled, none used",
    "policy": "a policy at every layer",
    "bias": "a policy that biases every token at every layer",
    "plans": "a plan on every request",
    "fused": "overrides enabled, none used, gating fused",
    "again": "stock in a second engine",
    "eager": "stock in forced eager mode",
}
CPU_VARIANTS = {name: VARIANTS[name] for name in ("again", "idle", "policy", "bias", "plans")} | {
    "usage": "expert usage counted, every request with a label",
    "all": "a policy, a plan and a label on every request",
}
# variant -> the engine that serves it
ENGINES = {
    "stock": "stock",
    "idle": "routes",
    "plans": "routes",
    "policy": "policy",
    "bias": "bias",
    "fused": "fused",
    "again": "again",
    "eager": "eager",
    "usage": "usage",
    "all": "all",
}
AGAINST = ", other tree"
# Engines without anything of ours, and those that cannot do without it.
BARE = ("stock", "again", "eager")
NEVER_IDLE = (*BARE, "fused")
# Beside weights and KV: CUDA context, activations, graphs.
OVERHEAD = int(2.5 * common.GIB)
STEP_TOKENS = 4096


def serve(options: dict[str, Any]) -> Talk:
    """Child: an engine that runs a load when told to."""
    common.support_path()
    clock = time.perf_counter
    if options["cpu"]:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        clock = time.process_time
        import engines  # noqa: F401 - the environment of CPU engines
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_unsafe_routes import ModelShape, RoutePlan

    config, name = options["config"], options["name"].removesuffix(AGAINST)
    shape = ModelShape.from_hf_config(config)
    spare = shape.num_experts - shape.top_k
    settings: dict[str, Any] = options["settings"]
    banned = list(range(1, 1 + min(4, spare - 2))) if name in ("policy", "all") else []
    routes = routes_of(name, shape, banned)
    if routes:
        settings["additional_config"] = {"unsafe_routes": routes}
    permitted = [expert for expert in range(shape.num_experts) if expert not in banned]
    label = {"usage_label": "bench"} if "usage" in routes else {}
    llm = LLM(options["folder"], **settings)
    if settings.get("load_format") == "dummy":
        enliven(llm, shape.num_experts)

    def plan(rng: random.Random, length: int) -> RoutePlan:
        made = RoutePlan()
        for layer in shape.moe_layers[:-1][:2]:
            made.disable(layer, "all", rng.sample(permitted, min(4, spare - len(banned))))
        for position in range(min(10, length)):
            made.force(shape.moe_layers[-1], [position], rng.sample(permitted, shape.top_k))
        return made

    command = yield "ready"
    while True:
        (count, length, max_tokens), is_idle = command["load"], command.get("idle", False)
        planned = command["variant"] in ("plans", "all") and not is_idle
        rng = random.Random(command["seed"])
        last = config["vocab_size"] - 8
        prompts = [TokensPrompt(prompt_token_ids=[rng.randrange(3, last) for _ in range(length)]) for _ in range(count)]
        extras = [(plan(rng, length).extra_args() if planned else {}) | (label if not is_idle else {}) for _ in prompts]
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(**asked, extra_args=extra) for extra in extras]
        with idle_hooks() if is_idle else contextlib.nullcontext():
            began = clock()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = clock() - began
        generated = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert generated == count * max_tokens, f"{generated} tokens generated"
        for output in outputs:
            receipt = (output.kv_transfer_params or {}).get("unsafe_routes", {})
            assert (receipt.get("plan") is not None) == planned, "a plan was not set, or one was"
            assert (receipt.get("policy") is not None) == ("policy" in routes), "a policy was not in force, or one was"
        command = yield {"seconds": seconds, "tokens": count * (length + max_tokens), "generated": generated}


def routes_of(name: str, shape: Any, banned: list[int]) -> dict[str, Any]:
    """The route settings of an engine, empty for those without anything of ours; its policy bans `banned` at every layer."""
    routes: dict[str, Any] = {"allow_overrides": True} if name in ("routes", "fused", "all") else {}
    if name in ("policy", "bias", "all"):
        bias = {str(expert): (expert % 5 - 2) / 4 for expert in range(shape.num_experts)} if name == "bias" else {}
        layers = {str(layer): {"disabled": banned, "bias": bias} for layer in shape.moe_layers}
        routes["policy"] = {"version": "route-policy/2", "layers": layers}
    if name in ("usage", "all"):
        routes["usage"] = ["bench"]
    if name == "fused":
        routes["gating"] = "fused"
    return routes


@contextlib.contextmanager
def idle_hooks() -> Iterator[None]:
    """Route control does nothing in forward passes of this process; steps of requests with plans must not come.

    It still follows which requests come and go, so that those of the turn before are forgotten.
    """
    from vllm_unsafe_routes.engine.router import controllers
    from vllm_unsafe_routes.engine.worker import RouteController

    def nothing(controller: Any, *_: Any) -> None:
        return

    def same(controller: Any, output: Any) -> Any:
        return output

    (controller,) = controllers.values()
    state = controller.state
    held = state.active, state.covered
    state.active, state.covered = False, ()
    with contextlib.ExitStack() as stack:
        for name in ("begin_forward", "direct", "end_forward"):
            stack.enter_context(mock.patch.object(RouteController, name, nothing))
        stack.enter_context(mock.patch.object(RouteController, "report", same))
        yield
    state.active, state.covered = held


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is served, and how.

    Attributes:
        key: of the model.
        config: its config.json.
        folder: where it is.
        kv_bytes: of one engine on a GPU.
        at_once: engines that fit beside each other.

    """

    key: str
    config: dict[str, Any]
    folder: Path
    kv_bytes: int
    at_once: int


def subject_of(key: str, run: Run) -> Subject:
    """The model, with as many layers as leave room for two engines side by side."""
    config = config_of(key, run.size)
    if not run.on_gpu:
        dtype = None if run.rehearse else "bfloat16"
        return Subject(key, config, make_model(run.scratch / f"serving-{key}", config, dtype), 0, 16)
    # A step's tokens twice over: prompts with one token to generate leave after their step.
    kv_tokens = 2 * STEP_TOKENS + max(count * (length + new) for count, length, new in loads_of(run).values() if new > 1)
    kv_bytes = int(kv_tokens * BYTES * sizes_of(config).num_layers * sizes_of(config).kv_values) + common.GIB // 4
    room = 0.97 * free_memory()
    while config["num_hidden_layers"] > 1 and room < 2 * (weight_bytes(config) + kv_bytes + OVERHEAD):
        config["num_hidden_layers"] -= 1
    at_once = max(2, int(room // (weight_bytes(config) + kv_bytes + OVERHEAD)))
    return Subject(key, config, make_model(run.scratch / f"serving-{key}", config), kv_bytes, at_once)


def free_memory() -> float:
    """Bytes of the GPU's memory."""
    free = common.first_line("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
    if free.isdecimal():
        return float(free) * (1 << 20)
    import torch

    return float(torch.cuda.mem_get_info()[0])


def loads_of(run: Run) -> dict[str, Load]:
    """The loads that were asked for."""
    loads = TINY_LOADS[run.device] if run.rehearse else LOADS[run.device]
    return {name: loads[name] for name in run.wanted(loads)}


def start_engine(name: str, subject: Subject, run: Run, against: Path | None, log: Path) -> Child:
    """The process of an engine; `against` is another tree, laid out, for the names that end in `AGAINST`."""
    settings = common.engine_settings(run, subject.kv_bytes, "eager" if name == "eager" else run.mode, enable_prefix_caching=False)
    settings |= {"dtype": "float32" if run.rehearse else "bfloat16", "max_num_seqs": 64}
    if run.rehearse or run.on_gpu:
        settings["load_format"] = "dummy"
    settings["max_model_len"] = {"tiny": 256, "cpu": 512, "full": 2048}[run.size]
    settings["max_num_batched_tokens"] = STEP_TOKENS
    if subject.config["model_type"] == "deepseek_v2":
        settings |= common.latent_settings(run)
    env = common.engine_environment(run, v2=False)
    if name in BARE:
        env["VLLM_PLUGINS"] = ""
    if name.endswith(AGAINST):
        env["PYTHONPATH"] = os.pathsep.join([str(against), *filter(None, [os.environ.get("PYTHONPATH")])])
    about = {"name": name, "folder": str(subject.folder), "config": subject.config, "settings": settings, "cpu": not run.on_gpu}
    return Child(__file__, "engine", about, log, env)


def measure_group(group: list[str], subject: Subject, run: Run, results: Results, against: Path | None, start: int) -> None:
    """For the time that is number `start`, start the engines of a group, warm them up, and let them take turns.

    Raises:
        ChildFailed: an engine ended or was too slow; what was measured stays.

    """
    children: dict[str, Child] = {}
    try:
        for name in common.rotated(group, start):
            children[name] = start_engine(name, subject, run, against, results.log)
            if not run.on_gpu:  # few cores: one after another
                children[name].read(run.left)
        for child in children.values() if run.on_gpu else ():
            child.read(run.left)
        results.step("engines ready", model=subject.key, engines="; ".join(group), start=start)
        engine_of = {**ENGINES, **{f"{variant}{AGAINST}": f"{engine}{AGAINST}" for variant, engine in ENGINES.items()}}
        variants = [variant for variant, engine in engine_of.items() if engine in group]

        def ask(variant: str, load: Load, seed: int) -> Row:
            child, request = children[engine_of[variant]], {"variant": variant.removesuffix(AGAINST), "load": load, "seed": seed}
            answer: Row = child.ask(run.left, **request)
            # An engine of two variants is asked once.
            if engine_of[variant] not in (*NEVER_IDLE, *(engine_of[other] for other in variants[: variants.index(variant)])):
                answer["idle_seconds"] = child.ask(run.left, **request, idle=True)["seconds"]
            return answer

        loads = loads_of(run)
        names = list(loads)
        # Eager mode is slow, and one load says what it costs.
        taking_part = {name: [variant for variant in variants if variant != "eager" or name == names[0]] for name in names}
        for name, (count, length, new) in loads.items():
            for variant in taking_part[name]:
                ask(variant, (count, length, min(new, 8)), 0)
        for at in common.rounds((1 if run.rehearse else run.rounds) * len(names), run.deadline):
            number, name = at // len(names), names[at % len(names)]
            found = {variant: ask(variant, loads[name], number + 1) for variant in common.rotated(taking_part[name], number)}
            take_down(subject, run, results, (name, start, number), {variant: found[variant] for variant in taking_part[name]})
    finally:
        for child in children.values():
            child.close()


def take_down(subject: Subject, run: Run, results: Results, turn: tuple[str, int, int], found: dict[str, Row]) -> None:
    """One round of one load, (load, start, round): a row for every variant."""
    load, start, number = turn
    about: Row = {} if run.on_gpu else {"start": start}
    if run.device == "cuda":
        about = {"model": NAMES[subject.key], "layers": subject.config["num_hidden_layers"], "mode": run.shown_mode}
    ratios = {}
    for variant, result in found.items():
        ratios[variant] = round(found["stock"]["seconds"] / result["seconds"], 4)
        results.row(
            **about,
            load=load,
            variant=variant,
            round=number,
            tokens=result["tokens"],
            seconds=round(result["seconds"], 5),
            tokens_per_s=round(result["tokens"] / result["seconds"], 1),
            new_tokens_per_s=round(result["generated"] / result["seconds"], 1),
            **({"idle_seconds": round(result["idle_seconds"], 5)} if "idle_seconds" in result else {}),
            ratio_to_stock=ratios[variant],
        )
    results.step("round", load=load, start=start, number=number, **ratios)


def groups_of(engines: list[str], at_once: int) -> list[list[str]]:
    """Engines that are up together, "stock" in every group."""
    others = [name for name in engines if name != "stock"]
    size = max(1, at_once - 1)
    return [["stock", *others[start : start + size]] for start in range(0, len(others), size)]


# Tables.


def ratios_of(rows: Rows, load: str, variant: str) -> list[float]:
    """A variant's ratios to stock, a round each."""
    return [float(row["ratio_to_stock"]) for row in rows if (row["load"], row["variant"]) == (load, variant)]


def quickest(rows: Rows, load: str, variant: str, idle: bool = False) -> list[float]:
    """Of each start of all engines, stock's quickest turn over the variant's; `idle`: its own engine's with idle hooks over it."""
    mine = [row for row in rows if row["load"] == load]

    def of_start(row: dict[str, Any]) -> tuple[Any, Any]:
        return row["commit"], row.get("start")

    def least(variants: Collection[str], start: tuple[Any, Any], column: str) -> float:
        chosen = [row for row in mine if row["variant"] in variants and of_start(row) == start]
        return min((float(row[column]) for row in chosen if row.get(column)), default=math.nan)

    others = [name for name in ENGINES if ENGINES[name] == ENGINES[variant]] if idle else ["stock"]
    ratios = [
        least(others, start, "idle_seconds" if idle else "seconds") / least([variant], start, "seconds")
        for start in dict.fromkeys(of_start(row) for row in mine if row["variant"] == variant)
    ]
    return [ratio for ratio in ratios if not math.isnan(ratio)]


def cpu_table(rows: Rows) -> str:
    """Ratios of quickest turns, median and range over starts."""
    loads = LOADS["cpu"]
    kinds = {"against stock": False, "against itself, idle": True}

    def cell(load: str, variant: str, idle: bool) -> str:
        return "-" if idle and variant in BARE else common.spread(quickest(rows, load, variant, idle), 3, 3)

    lines = [[name, *(cell(load, key, idle) for load in loads for idle in kinds.values())] for key, name in CPU_VARIANTS.items()]
    table = common.markdown(["same batch", *(f"{load}, {kind}" for load in loads for kind in kinds)], lines)
    if not rows:
        return table
    starts, turns = len(common.distinct(rows, "start")), 1 + max(int(row["round"]) for row in rows)
    note = f"Throughput ratio in CPU seconds of one core, of the quickest of {turns} turns each; median and range of"
    return f"{table}\n\n{note} {starts} starts of all engines. {common.where(rows)}"


def gpu_table(rows: Rows) -> str:
    """Of each load stock's tokens per second and the ratios of all variants."""
    lines = []
    for model, load in dict.fromkeys((row["model"], row["load"]) for row in rows):
        mine = [row for row in rows if row["model"] == model]
        rates = [float(row["tokens_per_s"]) for row in mine if (row["load"], row["variant"]) == (load, "stock")]
        name = f"{model}, {mine[0]['layers']} layers: {load}"
        lines.append([f"**{name}** (stock: {statistics.median(rates):,.0f} tokens/s)" if rates else f"**{name}**", "", "", ""])
        for variant, meaning in VARIANTS.items():
            if ratios := ratios_of(mine, load, variant):
                found = (quickest(mine, load, variant), quickest(mine, load, variant, idle=True))
                stock, itself = (f"{statistics.median(one):.3f}" if one else NOT_MEASURED for one in found)
                lines.append([meaning, stock, common.spread(ratios, 3, 3), "-" if variant in NEVER_IDLE else itself])
    modes = ", ".join(map(str, common.distinct(rows, "mode")))
    head = ["variant", "stock, quickest turns", "stock, median (range) of the rounds", "itself with idle hooks, quickest turns"]
    count = len({(row["commit"], row["round"]) for row in rows})
    note = f"Throughput over that of the column, up to {count} rounds, turn by turn; engine mode: {modes}."
    return f"{common.markdown(head, lines)}\n\n{note} {common.where(rows)}"


def trees_table(rows: Rows) -> str:
    """This tree's seconds over the other's in the same round: 1 is equal, more is slower."""
    seconds = {(row["load"], row["variant"], row.get("start"), row["round"]): float(row["seconds"]) for row in rows}
    lines = []
    for load in common.distinct(rows, "load"):
        for variant in VARIANTS:
            pairs = [
                (took, seconds[load, variant + AGAINST, *turn])
                for (of_load, of_variant, *turn), took in seconds.items()
                if (of_load, of_variant) == (load, variant) and (load, variant + AGAINST, *turn) in seconds
            ]
            if pairs:
                lines.append([load, VARIANTS[variant], common.spread([ours / theirs for ours, theirs in pairs], 3, 3)])
    return common.markdown(["load", "variant", "seconds of this tree over the other's"], lines)


def main() -> int:
    options = common.parser(__doc__, rounds=5)
    options.add_argument(
        "--engines",
        metavar="NAME,…",
        help="beside stock: routes (idle, plans), policy, bias, usage, all, fused, again, eager; default: all",
    )
    options.add_argument("--starts", type=int, default=6, help="how often all engines start, on the CPU (default: 6)")
    options.add_argument("--against", type=Path, metavar="TREE", help="also measure the package of this other checkout")
    args = options.parse_args()
    run = common.run_of(args)
    results, failed = Results(run, "serving_cost"), []
    against = common.lay_out(args.against.resolve(), run.scratch / "against") if args.against else None
    every = list(dict.fromkeys(ENGINES.values()))
    engines = ["stock", *args.engines.split(",")] if args.engines else every
    if unknown := set(engines) - set(every):
        options.error(f"no engine {', '.join(sorted(unknown))}; known are {', '.join(every)}")
    engines = [name for name in engines if name != "eager" or (run.on_gpu and run.mode != "eager")]
    engines = [name for name in engines if name not in (("usage", "all") if run.device == "cuda" else ("fused",))]
    engines += [f"{name}{AGAINST}" for name in ("routes", "policy") if against]
    for key in run.models:
        subject = subject_of(key, run)
        results.step("model begins", model=key, layers=subject.config["num_hidden_layers"], at_once=subject.at_once)
        starts = 1 if run.on_gpu or run.rehearse else args.starts
        for start, group in itertools.product(range(starts), groups_of(engines, subject.at_once)):
            try:
                measure_group(group, subject, run, results, against, start)
            except ChildFailed as error:
                results.step("group failed", model=key, group="; ".join(group), error=str(error))
                failed.append(key)
    table = cpu_table if run.device == "cpu" else gpu_table
    if results.rows and not run.rehearse:
        print(table(results.rows))
    if against:
        print(trees_table(results.rows))
    return 1 if failed or not results.rows else 0


if __name__ == "__main__":
    if not common.serve_child({"engine": serve}):
        sys.exit(main())
