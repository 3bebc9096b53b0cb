"""docs/python.md: its script and its reading of records run as they stand there, on real engines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_unsafe_routes import RoutePolicy
from vllm_unsafe_routes.report import collect, load_runs
from vllm_unsafe_routes.study.campaign import read_settings

pytestmark = [pytest.mark.v1_only, pytest.mark.timeout(2400)]  # three engines, and much else may be running
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_s_script_attacks_derives_and_attacks_again(tmp_path):
    script, reading = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(script.rstrip().splitlines()) <= 30
    done = subprocess.run([sys.executable, "-c", script + reading], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    out = tmp_path / "runs" / "python"
    policy = RoutePolicy.load(out / "policy" / "policy.json")
    assert re.search(rf"^ASR \d\.\d\d undefended, \d\.\d\d under policy {policy.digest}$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^forbidden-\d (True|False) -\d", done.stdout, re.MULTILINE)) == 3
    assert read_settings(out / "attacked")["policy"] is None
    assert read_settings(out / "defended")["policy"] == policy.digest
    for name in ("rosais", "attacked", "policy", "defended"):
        assert json.loads((out / name / "summary.json").read_text())
    assert len(collect(load_runs([out / name for name in ("rosais", "attacked", "defended")]))["asr"]) == 4
