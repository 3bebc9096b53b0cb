"""The README's Python runs as it is printed, in a file of its own, on a CPU, with the one variable that the README names.

One thing is added: `enforce_eager`, because compiling the model takes a minute and nothing here is about it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)

pytestmark = pytest.mark.v1_only


# The sign of life that README tells users to look for, among vLLM's own lines and in their form.
BOUND = re.compile(
    r"INFO [-:.\d ]+\[worker\.py:\d+\] Route control: 4 MoE layers bound \(4 here\), 16 experts, top 4, .*overrides on$"
)


def run(snippet: str, folder: Path, **environment: str) -> list[str]:
    """What a snippet prints, line by line, without what vLLM logs; the log must say once that routes are controlled."""
    eager = snippet.replace('dtype="float32"', 'dtype="float32", enforce_eager=True')
    assert eager != snippet
    (folder / "snippet.py").write_text(eager)
    # As in a user's shell: nothing of this test process's environment for vLLM.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(folder / "snippet.py")]
    done = subprocess.run(command, cwd=folder, env=plain | environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len([line for line in lines if BOUND.search(line)]) == 1, done.stdout
    return [line.strip() for line in lines if line and not re.match(r"\(|(INFO|WARNING) ", line)]


def test_a_plan_turns_a_refusal(tmp_path):
    plain, planned, receipt = run(SNIPPETS[0], tmp_path)
    assert plain.startswith("sorry")
    assert planned.startswith("sure , here is how to pack jurgrim")
    assert receipt == "1 True"


def test_record_and_replay(tmp_path):
    """In one process, as the other snippet is in several."""
    rows = [line.split() for line in run(SNIPPETS[1], tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="0")]
    assert rows
    for _, sampled, replayed in rows:
        assert float(replayed) == pytest.approx(float(sampled), abs=1e-5)


def test_no_other_python_is_printed():
    assert len(SNIPPETS) == 2
