"""What a policy costs on a real server: tokens/s, time to first token, inter-token latency, with and without one, turn by turn.

Two servers hold the same model, one without a policy and one with 4 of 64 experts banned at every layer. vLLM's own `bench serve`
sends each the same fixed load, in turns whose order changes from round to round, so that a machine whose speed drifts treats both
alike. The figure is the ratio within a round; the median over rounds and the range are reported. Beside the times stand the CPU
seconds that a server used for the load (on a CPU machine they say what a policy costs even where other work shares the cores).
Before anything is timed, each server must say of a request which policy it ran under.

    python benchmarks/policy_serving.py
    python benchmarks/policy_serving.py --rehearse        # tiny shape, two rounds: checks only

The model has the OLMoE shape with 8 layers and hidden size 512, random weights, bfloat16; its tokenizer is the lab model's, because
`bench serve` sends text.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from common import ROOT, Results, Rows, engine_environment, markdown, parser, rotated, rounds, run_of, spread, where
from shapes import config_of, make_model

VARIANTS = ("none", "policy")
# Requests, most at one time, prompt tokens, generated tokens.
LOAD, TINY_LOAD = (24, 8, 96, 32), (4, 2, 16, 4)
# The names are those of `bench serve`; CPU seconds are ours.
FIGURES = ("total_token_throughput", "output_throughput", "mean_ttft_ms", "mean_itl_ms", "mean_tpot_ms", "cpu_seconds")
BANNED = [1, 2, 3, 4]


class Server:
    """One variant's server, on a port of its own."""

    def __init__(self, model: Path, dtype: str, variant: str, policy: Path, log: Path, env: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.variant, self.log = f"http://127.0.0.1:{port}", variant, log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--served-model-name", "bench", "--dtype", dtype, "--max-model-len", "512"]
        # No prefix cache: every round must do the same work.
        command += ["--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "64"]
        if variant == "policy":
            command += ["--route-policy", str(policy)]
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **env})

    def wait(self, seconds: float) -> None:
        """Until it answers, and what it answers says that it runs what it should."""
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server of variant {self.variant} did not start:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):  # not there yet, or too busy to answer
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                break
            time.sleep(0.5)
        body = json.dumps({"model": "bench", "prompt": [5, 6, 7, 8], "max_tokens": 4, "ignore_eos": True}).encode()
        asked = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        receipt = (json.load(urllib.request.urlopen(asked, timeout=120)).get("kv_transfer_params") or {}).get("unsafe_routes", {})
        expected = "enforce" if self.variant == "policy" else None
        assert receipt.get("policy_mode") == expected, f"variant {self.variant} runs under {receipt}"

    def cpu_seconds(self) -> float:
        """CPU time of the server's processes so far."""
        root = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return float(sum(item.user + item.system for item in times))

    def displaced(self) -> float:
        """Picks displaced so far, all layers together."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vllm:unsafe_routes_displaced_total{")]
        return sum(float(value) for _, value in samples)

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def run_load(server: Server, model: Path, load: tuple[int, int, int, int], seed: int) -> dict[str, Any]:
    """One run of `bench serve`; its console command needs package metadata that a CPU wheel lacks, its module does not."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    requests, concurrency, prompt_tokens, generated_tokens = load
    parser: Any = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    serve.add_cli_args(parser)
    settings = {
        "backend": "openai",
        "base-url": server.url,
        "endpoint": "/v1/completions",
        "model": str(model),
        "served-model-name": "bench",
        "dataset-name": "random",
        "random-input-len": prompt_tokens,
        "random-output-len": generated_tokens,
        "num-prompts": requests,
        "max-concurrency": concurrency,
        "seed": seed,
        "temperature": 0,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    printed, before = io.StringIO(), server.cpu_seconds()
    with contextlib.redirect_stdout(printed):
        result = serve.main(parser.parse_args([*flags, "--ignore-eos", "--disable-tqdm"]))
    result["cpu_seconds"] = server.cpu_seconds() - before
    if result["completed"] != requests or result["total_output_tokens"] != requests * generated_tokens:
        raise RuntimeError(f"{result['completed']} of {requests} requests completed:\n{printed.getvalue()[-3000:]}")
    return result


def table(rows: Rows) -> str:
    """Medians of both variants, and median and range of the ratio within a round."""
    lines = []
    for figure in FIGURES:
        by_round: dict[Any, dict[str, float]] = {}
        for row in rows:
            by_round.setdefault(row["round"], {})[row["variant"]] = float(row[figure])
        pairs = [pair for pair in by_round.values() if len(pair) == len(VARIANTS)]
        medians = [f"{statistics.median(pair[variant] for pair in pairs):.1f}" for variant in VARIANTS]
        lines.append([figure, *medians, spread([pair["policy"] / pair["none"] for pair in pairs], 3, 2)])
    return f"{markdown(['figure', 'without', 'with a policy', 'ratio, median (range)'], lines)}\n\n{where(rows)}"


def main() -> int:
    run = run_of(parser(__doc__, rounds=9).parse_args())
    results = Results(run, "policy_serving")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    load, lab = TINY_LOAD if run.rehearse else LOAD, ROOT / "vllm_unsafe_routes/lab/model"
    config = config_of("olmoe", run.size) | {"vocab_size": json.loads((lab / "config.json").read_text())["vocab_size"]}
    # On some processors vLLM's bfloat16 kernels end in an illegal instruction with the tiny shape.
    dtype = "float32" if run.rehearse else "bfloat16"
    model = make_model(run.scratch / "policy-serving", config, dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lab / name, model / name)
    policy = run.scratch / "policy.json"
    layers = {str(layer): {"disabled": BANNED} for layer in range(config["num_hidden_layers"])}
    policy.write_text(json.dumps({"version": "route-policy/1", "layers": layers}))
    about = dict(zip(("requests", "concurrency", "prompt_tokens", "generated_tokens"), load, strict=True))
    # The engine in a process of its own, as a server has it.
    env = engine_environment(run, v2=False) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with contextlib.ExitStack() as stack:
        servers = {}
        for variant in VARIANTS:
            log = run.scratch / f"policy-serving-{variant}.log"
            servers[variant] = Server(model, dtype, variant, policy, log, env)
            stack.callback(servers[variant].close)
        for server in servers.values():
            server.wait(run.left)
            run_load(server, model, load, seed=0)
            results.step("server ready", variant=server.variant)
        for number in rounds(2 if run.rehearse else run.rounds, run.deadline):
            for position, variant in enumerate(rotated(VARIANTS, number)):
                found = run_load(servers[variant], model, load, seed=number + 1)
                figures = {figure: round(found[figure], 3) for figure in FIGURES}
                turn = {"round": number, "position": position, "variant": variant, "duration_s": round(found["duration"], 3)}
                results.row(**about, **turn, **figures)
            results.step("round", number=number)
        time.sleep(2)  # the counts come with a delay of up to a second
        assert servers["policy"].displaced() > 0, "the policy displaced nothing: its cost was not measured"
        assert servers["none"].displaced() == 0
    if not run.rehearse:
        print(table(results.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
