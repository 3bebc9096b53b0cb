"""The Triton kernels compile for GPUs that are not here, without spills, and the committed table lists what is compiled.

In a process of its own: this folder's tests run Triton's interpreter, which takes the compiler's place.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The smallest and the widest row, the deepest selection, and every output and option at least once.
REPRESENTATIVE = (
    "Mixtral 8/2, bf16, directives",
    "OLMoE 64/8",
    "DeepSeek-V3 256/8, bf16, directives",
    "Qwen3-Next 512/10",
    "row index",
)
SPILLED, SHARED = -2, -1


def compile_table(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/compile_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_no_spills_on_any_target_and_the_table_is_complete():
    done = compile_table("--check", str(ROOT / "docs/kernels.md"), "--only", *REPRESENTATIVE)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| ")]
    header, rows = lines[0], lines[1:]
    assert header == ["variant", "sm_80", "sm_90", "sm_100", "gfx942", "spilled", "shared"]
    for text in REPRESENTATIVE:
        assert any(text in row[0] for row in rows)
    for row in rows:
        assert row[SPILLED] == "0"
        # Several tokens a program: one layout is turned into another on some targets. A reduction never needs it.
        assert int(row[SHARED]) <= (128 if "tokens a program" in row[0] else 0)
        for cell in row[1:SPILLED]:
            registers, instructions, load_bits = map(int, cell.split(" / "))
            assert 0 < registers <= 128
            assert instructions > 0
            assert load_bits in (16, 32, 64, 128)


def test_a_table_with_other_rows_fails(tmp_path):
    document = (ROOT / "docs/kernels.md").read_text()
    changed = tmp_path / "kernels.md"
    changed.write_text(re.sub(r"^\| row index .*\n", "", document, flags=re.MULTILINE))
    done = compile_table("--check", str(changed), "--only", "row index", "--targets", "sm_90")
    assert done.returncode == 1
    assert "row index" in done.stderr
