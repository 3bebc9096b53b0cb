"""The pages' Python runs as it is printed, block after block; for README, python.md, rl.md and evaluation.md see their own tests.

In one process, where a snippet needs no `__main__` guard, and eagerly, because compiling takes a minute and nothing is about it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Page -> what must hold after its blocks.
PAGES = {
    "plans.md": "assert receipt.routes_set == len(receipt.route_ids) and len(replay) >= len(receipt.route_ids)",
    "search.md": "assert scores.shape == (2,) and (scores < 0).all() and scores[0] != scores[1]",
    "lab-model.md": "assert verdict == 'refused'",
}

pytestmark = pytest.mark.v1_only


@pytest.mark.parametrize("page", PAGES)
def test_the_page_s_snippets(page, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    script = "\n".join([*snippets, PAGES[page]]).replace('dtype="float32"', 'dtype="float32", enforce_eager=True')
    plain = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=plain | environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
