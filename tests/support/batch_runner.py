"""Runs one batch in a process of its own and writes what came out: `python batch_runner.py job.json out.json`.

A job: {"model", "routes" (or null), "settings", "prompts", "extras", "sampling"}. Log-probabilities are written exactly. With
"cells", arguments of `Cells.of`, the last result is {"scores"} of the candidates, or {"error"} where the engine cannot score cells;
with "usage" it is the expert usage.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_batch(job: dict[str, Any], scratch: Path, **environment: str) -> list[dict[str, Any]]:
    """Run a job in a fresh process; returns per request `token_ids`, `logprobs` (hex floats) and `receipt`."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, __file__, "job.json", "out.json"],
        cwd=scratch,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((scratch / "out.json").read_text())


def scores_of(llm: Any, arguments: list[Any]) -> dict[str, Any]:
    from vllm_unsafe_routes.cells import Cells
    from vllm_unsafe_routes.engine.cell_blocks import CellsUnavailable, ask

    try:
        (found,) = ask(llm.llm_engine.engine_core, [Cells.of(*arguments)])
    except CellsUnavailable as error:
        return {"error": str(error)}
    return {"scores": found.values.tolist()}


def main() -> None:
    from engines import chosen_logprobs, engine, generate

    from vllm_unsafe_routes.engine.usage import expert_usage

    job = json.loads(Path(sys.argv[1]).read_text())
    with engine(job["model"], job["routes"], **job["settings"]) as llm:
        outputs = generate(llm, job["prompts"], job["extras"], **job["sampling"])
        last = [scores_of(llm, job["cells"])] if "cells" in job else [expert_usage(llm)] if "usage" in job else []
    results = [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": [value.hex() for value in chosen_logprobs(output, output.prompt_logprobs is not None)],
            "receipt": (output.kv_transfer_params or {}).get("unsafe_routes"),
        }
        for output in outputs
    ]
    Path(sys.argv[2]).write_text(json.dumps([*results, *last]))


if __name__ == "__main__":
    main()
