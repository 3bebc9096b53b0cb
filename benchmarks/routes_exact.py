"""Is it right on this device? Every check is a process of its own; a failed one does not stop the others.

- kernels: the Triton kernels against the specification's loop in float64, ids exact.
- exact-<model>: the published shape with dummy weights, random plans, V2 runner, CUDA graphs: the router logits that the engine
  itself had are recorded, and the routes that came back must be what the plan says for these logits, ids in order.
- agree-<model>: scores of the engine and of transformers under forced routes, float32 (16 bits for latent attention on a GPU).
- replays: plans that change from one graph replay to the next, requests that come and go in a running batch, a policy on top;
  mode-<mode>: the same in another mode than the run's.
- identity: requests without a plan against stock vLLM, same batch, token for token.
- isolation: the CPU suite's random mix (chunked prefill, preemption, prefix reuse, aborts), each request again alone.

    python benchmarks/routes_exact.py --device cuda --jobs 5 --only kernels,exact-olmoe,mode-eager,agree-olmoe
    python benchmarks/routes_exact.py --rehearse --only kernels,replays
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import search_speed
from common import NOT_MEASURED, Child, ChildFailed, Results, Rows, Run, Talk
from shapes import NAMES, config_of, enliven, make_model

MIB = 1 << 20
# What the shape of a tiny model becomes on a GPU. Deep latents are those of the real model.
WIDER = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
MANY_EXPERTS = {**WIDER, "num_experts": 64, "num_experts_per_tok": 8}
# By layer, experts for the prompt's tokens and for generated ones.
Wish = tuple[dict[int, list[int]], dict[int, list[int]]]
GROUPED = {"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
TINY_GROUPED = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
# Weights relative to the largest of a token; float32 sums of up to 64 exponentials.
WEIGHT_TOLERANCE = 1e-5


def names() -> list[str]:
    """All checks, the most telling first."""
    models = [*(f"exact-{key}" for key in (*NAMES, "deepseek_v2")), "agree-olmoe", "agree-deepseek_v2_lite"]
    modes = [f"mode-{mode}" for mode in common.MODES]
    return ["kernels", "replays", *models, *modes, "identity", "isolation"]


# The checks; each is a generator that yields its result once.


def check_kernels(options: dict[str, Any]) -> Talk:
    """Against the loop in float64, and 16,384 tokens at once on a GPU."""
    run = Run.of(options["run"])
    if run.rehearse:
        os.environ["VLLM_UNSAFE_ROUTES_KERNEL"] = "triton"
    from kernels_exact import check_many_tokens, run_cases

    if not run.on_gpu:
        yield run_cases("cpu", 2, 3, ("Mixtral", "OLMoE"))
        return
    found = run_cases("cuda", 6, 24)
    for experts, top_k in ((64, 8), (60, 4), (8, 2), (64, 6)):
        check_many_tokens(experts, top_k)
    yield {**found, "tokens_at_once": 16384}


class Probe:
    """Records the router logits of every token, inside CUDA graphs too."""

    def __init__(self) -> None:
        import torch

        from vllm_unsafe_routes.engine.worker import RouteController as Controller

        self.logits: dict[tuple[str, int, int], Any] = {}
        self._owner, self._own = Controller, (Controller.direct, Controller.begin_forward, Controller.end_forward)
        own_direct, own_begin, own_end = self._own
        buffers: dict[int, Any] = {}
        batch: list[tuple[str, int, list[int]]] = []  # request, first token in the batch, positions

        def direct(controller: Any, slot: int, weights: Any, ids: Any, logits: Any, hidden: Any) -> None:
            own_direct(controller, slot, weights, ids, logits, hidden)
            # The first call is the eager profiling run, so no buffer belongs to a graph's memory.
            if slot not in buffers:
                buffers[slot] = torch.zeros(controller.capacity, logits.shape[1], dtype=logits.dtype, device=logits.device)
            buffers[slot][: logits.shape[0]].copy_(logits)

        def begin_forward(controller: Any, req_ids: Any, query_start_loc: Any, positions: Any) -> None:
            own_begin(controller, req_ids, query_start_loc, positions)
            bounds, where_to = query_start_loc[: len(req_ids) + 1].tolist(), positions.tolist()
            names = [re.sub(r"-[0-9a-f]{8}$", "", name) for name in req_ids]
            batch[:] = [(name, bounds[at], where_to[bounds[at] : bounds[at + 1]]) for at, name in enumerate(names)]

        def end_forward(controller: Any, *arguments: Any) -> None:
            own_end(controller, *arguments)
            for slot, buffer in buffers.items():
                host = buffer.float().cpu().clone()
                for name, first, positions in batch:
                    for at, position in enumerate(positions):
                        self.logits[name, slot, position] = host[first + at]

        Controller.direct, Controller.begin_forward, Controller.end_forward = direct, begin_forward, end_forward  # type: ignore

    def remove(self) -> None:
        """Record nothing more."""
        self._owner.direct, self._owner.begin_forward, self._owner.end_forward = self._own  # type: ignore[method-assign]


class Replays:
    """Counts CUDA graph replays."""

    def __init__(self) -> None:
        import torch

        self.count = 0
        if not torch.cuda.is_available():
            return
        own = torch.cuda.CUDAGraph.replay

        def replay(graph: Any) -> None:
            self.count += 1
            own(graph)

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]

    def check(self, run: Run) -> None:
        """Raises `AssertionError` if there was none where there must be some."""
        assert not run.on_gpu or run.mode == "eager" or self.count, "no CUDA graph was replayed: decode did not run in graphs"


def requests(rng: random.Random, shape: Any, count: int, longest: int, vocab: int) -> tuple[list[list[int]], list[Any]]:
    """Prompts and plans, one in six without."""
    from engines import random_prompt
    from mixes import random_plan

    prompts = [random_prompt(rng, rng.randrange(4, longest), vocab) for _ in range(count)]
    return prompts, [None if at % 6 == 0 else random_plan(rng, shape, len(prompt)) for at, prompt in enumerate(prompts)]


def check_exact(options: dict[str, Any]) -> Talk:
    """The routes that came back are what the plans say for the engine's own logits."""
    common.support_path()
    from engines import engine, generate

    from vllm_unsafe_routes import ModelShape

    run, key = Run.of(options["run"]), options["model"]
    base = "deepseek_v2_lite" if key == "deepseek_v2" else key
    config = config_of(base, run.size, num_layers=6 if run.on_gpu else 3)
    if key == "deepseek_v2":
        config |= GROUPED if run.on_gpu else TINY_GROUPED
    folder = make_model(run.scratch / f"exact-{key}", config)
    shape, rng = ModelShape.from_hf_config(config), random.Random(7)
    prompts, plans = requests(rng, shape, 32 if run.on_gpu else 12, 120 if run.on_gpu else 40, config["vocab_size"] - 8)
    replays, probe = Replays(), Probe()
    settings = common.engine_settings(run, 1 << 30, load_format="dummy", max_num_seqs=32)
    settings |= {"dtype": "bfloat16" if run.on_gpu else "float32", "max_num_batched_tokens": 512 if run.on_gpu else 64}
    if base == "deepseek_v2_lite":
        # On a GPU a block size that all kernels for latent attention take.
        settings |= common.latent_settings(run) | ({"block_size": 64} if run.on_gpu else {})
    settings |= {"enable_prefix_caching": False, "max_model_len": 256}
    with engine(folder, {"allow_overrides": True}, **settings) as llm:
        enliven(llm, shape.num_experts)
        extras: list[dict[str, Any] | None] = [{"return_routes": True, **(plan.extra_args() if plan else {})} for plan in plans]
        outputs = generate(llm, prompts, extras, max_tokens=24 if run.on_gpu else 6)
        counts = llm.llm_engine.engine_core.engine_core.unsafe_routes_status()["counts"]
    # Every layer's router was asked in every step, by the marks that the kernel leaves; in replays too.
    assert not any(counts["missed"]) and not any(counts["num_nan"]), counts
    probe.remove()
    compared = Compared(config)
    for prompt, plan, output in zip(prompts, plans, outputs, strict=True):
        compared.request(prompt, plan, output, shape, probe.logits)
    assert compared.directed and compared.undirected
    assert compared.worst <= WEIGHT_TOLERANCE, f"a weight is {compared.worst} off"
    replays.check(run)
    yield {
        "directed": compared.directed,
        "undirected": compared.undirected,
        "equal_scores_otherwise_ordered": compared.near_ties,
        "worst_weight_error": compared.worst,
        "graph_replays": replays.count,
    }


class Compared:
    """Routes that came back against what the plan says for the logits that were recorded.

    Args:
        config: the model's config.json.

    """

    def __init__(self, config: dict[str, Any]) -> None:
        from types import SimpleNamespace

        from oracle import Oracle

        # The oracle's gating needs no weights.
        bare: Any = object.__new__(Oracle)
        bare.config = SimpleNamespace(**config)
        self._oracle = bare
        self.directed = self.undirected = self.near_ties = 0
        self.worst = 0.0

    def request(self, prompt: list[int], plan: Any, output: Any, shape: Any, logits: dict[tuple[str, int, int], Any]) -> None:
        """All tokens and layers of one request.

        Raises:
            AssertionError: the first difference.

        """
        from oracle import _read_wishes

        from vllm_unsafe_routes import receipt_of

        receipt = receipt_of(output)
        assert receipt.route_ids is not None and receipt.route_weights is not None
        tokens = len(prompt) + len(output.outputs[0].token_ids) - 1
        assert receipt.route_ids.shape == (tokens, len(shape.moe_layers), shape.top_k), receipt.route_ids.shape
        assert receipt.cached_tokens == 0
        wishes = _read_wishes(plan, tokens, len(prompt)) if plan is not None else {}
        for slot, layer in enumerate(shape.moe_layers):
            for position in range(tokens):
                place = f"layer {layer}, position {position}, request {output.request_id}"
                got = receipt.route_ids[position, slot].tolist(), receipt.route_weights[position, slot]
                self._token(wishes.get(layer, {}).get(position), logits[output.request_id, slot, position], *got, place)

    def _token(self, wish: Any, logits: Any, got: list[int], got_weights: Any, place: str) -> None:
        import torch
        from oracle import _Wish

        weights, expected = self._oracle._route(None, logits.double(), wish or _Wish(False))
        if wish is None:
            self.undirected += 1
            if set(got) != set(expected):
                # The model's own gating may take another of two equal scores.
                found, wanted = (logits[ids].double().sort().values for ids in (got, expected))
                gap = abs(found - wanted).max().item()
                assert gap <= 1e-6, f"{place}: undirected, expected {expected}, got {got}: {gap} apart"
                self.near_ties += 1
            return
        self.directed += 1
        if got != expected:
            assert not wish.forced, f"{place}: forced {expected}, got {got}"
            assert not wish.disabled & set(got), f"{place}: a disabled expert was used"
            gap = abs(logits[got].double().softmax(0) - logits[expected].double().softmax(0)).max().item()
            assert gap < 1e-6, f"{place}: expected {expected}, got {got}"
            self.near_ties += 1
            return
        error = abs(weights - torch.from_numpy(got_weights.copy()).double()).max().item()
        self.worst = max(self.worst, error / max(weights.abs().max().item(), 1e-9))


def check_identity(options: dict[str, Any]) -> Talk:
    """Requests without a plan get stock vLLM's tokens."""
    common.support_path()
    import tiny_models
    from batch_runner import run_batch
    from engines import random_prompt

    from vllm_unsafe_routes import RoutePlan

    run = Run.of(options["run"])
    scratch = run.scratch / "identity"
    folder = tiny_models.make_model("olmoe", scratch / "model", **(MANY_EXPERTS if run.on_gpu else {}))
    rng, count = random.Random(3), 32 if run.on_gpu else 4
    prompts = [random_prompt(rng, rng.randrange(8, 96 if run.on_gpu else 32), tiny_models.VOCAB_SIZE) for _ in range(count)]
    settings = common.engine_settings(run, 256 * MIB, enable_prefix_caching=False)
    settings["dtype"] = "bfloat16" if run.on_gpu else "float32"
    job = {"model": str(folder), "routes": None, "settings": settings, "prompts": prompts, "extras": [None] * count}
    job["sampling"] = {"max_tokens": 48 if run.on_gpu else 4}
    overrides = {"allow_overrides": True}
    plan = RoutePlan().disable(1, "all", [0, 1, 2]).force(2, [1, 3], list(range(8 if run.on_gpu else 4)))
    mixed = [plan.extra_args() if at % 2 else None for at in range(count)]
    runs: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "stock": (job, {"VLLM_PLUGINS": ""}),
        "idle": ({**job, "routes": overrides}, {}),
        "beside plans": ({**job, "routes": overrides, "extras": mixed}, {}),
    }
    if run.on_gpu:
        runs["stock again"] = runs["stock"]
        runs["installed"] = (job, {})
    with ThreadPoolExecutor(len(runs) if run.on_gpu else 1) as pool:
        asked = {name: pool.submit(run_batch, this, scratch / name.replace(" ", "-"), **env) for name, (this, env) in runs.items()}
        found = {name: future.result() for name, future in asked.items()}

    def tokens(name: str, step: int = 1) -> list[Any]:
        return [one["token_ids"] for one in found[name][::step]]

    def bitwise(name: str, step: int = 1) -> bool:
        return [one["logprobs"] for one in found[name][::step]] == [one["logprobs"] for one in found["stock"][::step]]

    if run.on_gpu:
        assert tokens("stock again") == tokens("stock"), "stock vLLM differs from itself: nothing can be compared"
        assert tokens("installed") == tokens("stock"), "the plugin without configuration changes tokens"
    assert tokens("idle") == tokens("stock"), "overrides enabled and unused change tokens"
    assert tokens("beside plans", 2) == tokens("stock", 2), "requests without a plan change beside planned ones"
    changed = sum(one["logprobs"] != other["logprobs"] for one, other in zip(found["beside plans"], found["stock"], strict=True))
    assert changed >= count // 2 - 1, "the plans changed nothing"
    yield {
        "requests": count,
        "tokens": sum(map(len, tokens("stock"))),
        "logprobs_bitwise_idle": bitwise("idle"),
        "logprobs_bitwise_beside_plans": bitwise("beside plans", 2),
        "logprobs_bitwise_stock_again": bitwise("stock again") if run.on_gpu else None,
    }


class Changing:
    """Plans that force other experts for the prompt than for generated tokens, at every layer, under a policy.

    Args:
        shape: the model's.

    """

    banned = (1, 2)

    def __init__(self, shape: Any) -> None:
        self._shape, self.rng, self.checked = shape, random.Random(5), 0
        layers = {str(layer): {"disabled": list(self.banned)} for layer in shape.moe_layers}
        self.policy = {"version": "route-policy/1", "layers": layers}

    def wish(self) -> Wish:
        """By layer, experts for the prompt and for generated tokens."""
        free = [expert for expert in range(self._shape.num_experts) if expert not in self.banned]
        prompt, generated = (
            {layer: self.rng.sample(free, self._shape.top_k) for layer in self._shape.moe_layers} for _ in range(2)
        )
        return prompt, generated

    def extras(self, wish: Wish | None) -> dict[str, Any]:
        """Of a request that is to return its routes."""
        from vllm_unsafe_routes import RoutePlan

        if wish is None:
            return {"return_routes": True}
        plan = RoutePlan()
        for layer in self._shape.moe_layers:
            plan.force(layer, "prompt", wish[0][layer]).force(layer, "generated", wish[1][layer])
        return {"return_routes": True, **plan.extra_args()}

    def obeyed(self, output: Any, wish: Wish | None) -> None:
        """Raises `AssertionError` at the first route that is another one."""
        from vllm_unsafe_routes import receipt_of

        ids, length = receipt_of(output).route_ids, len(output.prompt_token_ids)
        assert ids is not None
        assert not set(ids.ravel().tolist()) & set(self.banned), "a banned expert was used"
        if wish is None:
            return
        for slot, layer in enumerate(self._shape.moe_layers):
            for position in range(len(ids)):
                expected = wish[position >= length][layer]
                assert ids[position, slot].tolist() == expected, f"layer {layer}, position {position}: {expected}"
                self.checked += 1


def check_replays(options: dict[str, Any]) -> Talk:
    """Every returned route obeys its own plan and the policy, whatever graph was replayed before."""
    common.support_path()
    import tiny_models
    from engines import engine, generate, random_prompt

    from vllm_unsafe_routes import ModelShape

    run = Run.of(options["run"])
    folder = tiny_models.make_model("olmoe", run.scratch / options["name"], **(MANY_EXPERTS if run.on_gpu else {}))
    changing = Changing(ModelShape.from_hf_config(json.loads((folder / "config.json").read_text())))
    settings = common.engine_settings(run, 256 * MIB, enable_prefix_caching=False, max_num_seqs=8)
    settings |= {"dtype": "bfloat16" if run.on_gpu else "float32", "max_num_batched_tokens": 256}
    replays, (count, waves, max_tokens) = Replays(), (8, 6, 24) if run.on_gpu else (4, 2, 5)
    with engine(folder, {"allow_overrides": True, "policy": changing.policy}, **settings) as llm:
        # The same batch shape again and again: the same graphs, other plans, sometimes none.
        for wave in range(waves):
            wishes = [None if (wave + at) % 4 == 3 else changing.wish() for at in range(count)]
            prompts = [random_prompt(changing.rng, 16, tiny_models.VOCAB_SIZE) for _ in wishes]
            outputs = generate(llm, prompts, [changing.extras(wish) for wish in wishes], max_tokens=max_tokens)
            for output, wish in zip(outputs, wishes, strict=True):
                changing.obeyed(output, wish)
        come_and_go(llm.llm_engine, changing, 3 * count, max_tokens, tiny_models.VOCAB_SIZE)
    replays.check(run)
    yield {"routes_checked": changing.checked, "graph_replays": replays.count}


def come_and_go(core: Any, changing: Changing, count: int, max_tokens: int, vocab: int) -> None:
    """Requests that join and leave a running batch: rows change owners between two replays."""
    from engines import random_prompt
    from vllm import SamplingParams, TokensPrompt

    rng, wishes, steps = changing.rng, dict[str, Wish](), 0
    while len(wishes) < count or core.has_unfinished_requests():
        if len(wishes) < count and steps % 2 == 0:
            name, wish = f"stagger-{len(wishes)}", changing.wish()
            wishes[name] = wish
            asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randrange(2, max_tokens), "ignore_eos": True}
            params = SamplingParams(**asked, detokenize=False, extra_args=changing.extras(wish))
            core.add_request(name, TokensPrompt(prompt_token_ids=random_prompt(rng, rng.randrange(4, 30), vocab)), params)
        steps += 1
        for output in core.step():
            if output.finished:
                changing.obeyed(output, wishes[output.request_id])


def check_mode(options: dict[str, Any]) -> Talk:
    """`replays` under another mode than the run's."""
    yield from check_replays({**options, "run": {**options["run"], "mode": options["model"]}})


def check_agree(options: dict[str, Any]) -> Talk:
    """Scores of the engine and of transformers under forced routes."""
    yield from search_speed.agreement(search_speed.agreement_options(options["model"], Run.of(options["run"])))


def check_isolation(options: dict[str, Any]) -> Talk:
    """The CPU suite's random mix, in this run's mode."""
    common.support_path()
    import engines
    import pytest
    import tiny_models

    run = Run.of(options["run"])
    path = common.ROOT / "tests/engine/test_isolation.py"
    spec = importlib.util.spec_from_file_location("test_isolation", path)
    assert spec is not None and spec.loader is not None
    test: Any = importlib.util.module_from_spec(spec)
    sys.modules["test_isolation"] = test
    spec.loader.exec_module(test)
    own, replays = engines.engine, Replays()

    def engine(model: Any, routes: Any, **settings: Any) -> Any:
        more = common.engine_settings(run, 256 * MIB, max_num_seqs=settings["max_num_seqs"])
        return own(model, routes, **{**more, **common.float32_settings(run), "block_size": 32, **settings})

    test.engine, test.V1_RUNNER = engine, False
    test.TOLERANCE = 2e-3 if run.on_gpu else 1e-4
    folder = tiny_models.make_model("olmoe", run.scratch / "isolation", **(MANY_EXPERTS if run.on_gpu else {}))
    seeds, count = ((1, 2), 64) if run.on_gpu else ((1,), 24)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for seed in seeds:
            test.check_mix(folder, seed, count, monkeypatch)
    yield {"mixes": len(seeds), "requests": len(seeds) * count, "graph_replays": replays.count}


FUNCTIONS = {
    "kernels": check_kernels,
    "exact": check_exact,
    "agree": check_agree,
    "identity": check_identity,
    "replays": check_replays,
    "mode": check_mode,
    "isolation": check_isolation,
}


def environment(kind: str, run: Run) -> dict[str, str]:
    """Environment of a check's process; on CPU the V2 runner and the kernels are interpreted."""
    env = common.engine_environment(run, v2=kind != "agree")
    if run.on_gpu:
        return env | (common.EXACT_FLOAT32 if kind in ("isolation", "agree") else {})
    return env | ({} if kind == "agree" else {"TRITON_INTERPRET": "1"})


def run_check(name: str, run: Run, results: Results) -> bool:
    """One check in a process of its own; True unless it failed."""
    start = time.monotonic()
    kind, _, model = name.partition("-")
    results.step("check begins", check=name)
    log, child = run.scratch / f"check-{name}.log", None
    try:
        if run.left <= 1:
            raise ChildFailed("no time left")
        child = Child(__file__, kind, {"name": name, "model": model, "run": run.told()}, log, environment(kind, run))
        found = {"result": "pass", **child.read(run.left)}
    except ChildFailed as error:
        found = {"result": "fail", "details": str(error)}
    finally:
        if child is not None:
            child.close()
    seconds = round(time.monotonic() - start, 1)
    results.row(check=name, mode=run.shown_mode, seconds=seconds, **found)
    details = {key: value for key, value in found.items() if key != "result"}
    results.step(f"check ends: {found['result']}", check=name, seconds=seconds, **details)
    if found["result"] == "fail" and log.exists():
        (run.out / log.name).write_text(log.read_text(errors="replace")[-20000:])
    return bool(found["result"] != "fail")


def table(rows: Rows) -> str:
    """One line a check, with the counts that show that it checked something."""
    if not rows:
        return NOT_MEASURED
    hidden = {"check", "result", "seconds", "mode", "details", "date", "commit", "device", "driver", "torch", "triton", "vllm"}
    hidden |= {"transformers", "rehearsal"}

    def shown(name: str, value: Any) -> str:
        number = f"{value:.1e}" if isinstance(value, float) else value
        return f"{name.replace('_', ' ')} {number}"

    lines = []
    for row in {(row["check"], row.get("mode")): row for row in rows}.values():
        counts = ", ".join(shown(name, value) for name, value in row.items() if name not in hidden)
        lines.append([row["check"], row.get("mode", ""), row["result"], row.get("details") or counts])
    return f"{common.markdown(['check', 'mode', 'result', 'what was checked'], lines)}\n\n{common.where(rows)}"


def main() -> int:
    run = common.run_of(common.parser(__doc__).parse_args())
    results = Results(run, "routes_exact")
    if not run.on_gpu and not run.rehearse:
        raise SystemExit("the test suite checks this on CPU; --rehearse runs these checks there")
    wanted = run.wanted(names())
    with ThreadPoolExecutor(run.jobs) as pool:
        passed = list(pool.map(lambda name: run_check(name, run, results), wanted))
    failed = [name for name, ok in zip(wanted, passed, strict=True) if not ok]
    results.step("done", failed=",".join(failed) or "none")
    if not run.rehearse:
        print(table(results.rows))
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    if not common.serve_child(FUNCTIONS):
        sys.exit(main())
