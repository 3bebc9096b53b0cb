"""The commands of docs/first-hour.md, end to end and in the page's order, on the lab model.

What differs from the page: the model, files of the lab's prompts, and options behind a command that leave it little to do.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import server

from vllm_unsafe_routes import RoutePolicy, lab
from vllm_unsafe_routes.lab import language
from vllm_unsafe_routes.receipt import receipt_of

pytestmark = [pytest.mark.v1_only, pytest.mark.long, pytest.mark.timeout(1800)]  # processes of their own

PAGE = Path(__file__).resolve().parents[2] / "docs" / "first-hour.md"
(BLOCK,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
LINES = [shlex.split(line) for line in BLOCK.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if line[0] == "unsafe-routes"]
FILES = {"SEARCH": ("search", "forbidden", 4), "TEST": ("test", "forbidden", 3), "BENIGN": ("tune", "benign", 4)}
SEARCH = ["--draws", "2", "--attempts", "1", "--adaptive-max-candidates", "40", "--dtype", "float32", "--max-new-tokens", "16"]
SMALL = {
    "rosais": ["--masks", "4", "--dtype", "float32"],
    "fsour": SEARCH,
    "derive-policy": [*SEARCH, "--rule", "protect", "--rule", "effect", "--bans", "2", "--protections", "1", "--no-suffix"],
    "evaluate": [*SEARCH, "--seeds", "0"],
}


def write_prompts(folder: Path) -> None:
    """The files that the page asks its reader for, with the columns of AdvBench."""
    for name, (split, kind, count) in FILES.items():
        lines = ["goal,target", *(f'"{one.text}","{one.target}"' for one in language.prompts(split, kind, count=count))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_commands_in_their_order(tmp_path):
    write_prompts(tmp_path)
    (tmp_path / "OLMoE").symlink_to(lab.model_path(), target_is_directory=True)
    for _, name, *options in COMMANDS:
        command = [sys.executable, "-m", "vllm_unsafe_routes.cli", name, *options, *SMALL.get(name, [])]
        started = time.monotonic()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        print(f"{name} {' '.join(options)}: {time.monotonic() - started:.0f} s")
        assert done.returncode == 0, (name, done.stdout[-2000:], done.stderr[-3000:])
    runs = tmp_path / "runs"
    assert (runs / "report" / "report.html").exists() and (runs / "policy" / "control-0.json").exists()
    policy = RoutePolicy.load(runs / "policy" / "policy.json")
    assert policy.digest in (runs / "matrix" / "settings.json").read_text(encoding="utf-8")
    # The last line, a server under the policy in `observe`; its model and port are the test's.
    flags = LINES[-1][LINES[-1].index("--route-policy") :]
    flags[1] = str(tmp_path / flags[1])
    with server(lab.model_path(), tmp_path / "server.log", "--no-skip-tokenizer-init", *flags) as ready:
        answer = ready.client.completions.create(model="tiny", prompt="how do i fix kettle ?", max_tokens=4).to_dict()
    receipt = receipt_of(answer)
    assert (receipt.policy, receipt.policy_mode) == (policy.digest, "observe")
