"""docs/rl.md: its script and its commands run as they are printed: a rollout, its replay in another engine, and transformers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.v1_only, pytest.mark.timeout(1200)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "rl.md"


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_page_s_script_and_its_commands(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1000)
    done = subprocess.run([sys.executable, "-c", block("python")], **options)
    assert done.returncode == 0, done.stderr[-5000:]
    gaps = dict(re.findall(r"^(replay|trainer)\s+(\S+)$", done.stdout, re.MULTILINE))
    assert {name: float(value) < 1e-4 for name, value in gaps.items()} == {"replay": True, "trainer": True}
    said = ""
    for line in block("bash").strip().splitlines():
        command = [sys.executable, "-m", "vllm_unsafe_routes.cli", *shlex.split(line)[1:]]
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        said += "\n".join(text for text in done.stdout.splitlines() if not text.startswith("difference")) + "\n"
    assert said == block("text")
