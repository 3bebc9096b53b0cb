"""Tables come from committed CSV files, results are merged by what they measured, and a rehearsal goes nowhere."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import search_speed
import tables
from common import NOT_MEASURED, read_csv
from serving_cost import VARIANTS

ROOT = Path(__file__).parents[2]
ABOUT = {"date": "2026-01-01", "commit": "abc", "device": "Test GPU", "driver": "1", "torch": "2", "triton": "3"}
ABOUT |= {"transformers": "5", "vllm": "0.32.0", "rehearsal": False}


def shown(mark: str, root: Path = ROOT) -> list[str]:
    """The tables that stand between a mark's begin and end."""
    texts = [path.read_text(encoding="utf-8") for path in tables.documents(root)]
    pairs = [text.partition(f"<!-- {mark}:begin -->\n")[2].partition(f"\n<!-- {mark}:end -->") for text in texts]
    return [table for table, end, _ in pairs if end]


@pytest.mark.parametrize("mark", list(tables.tables()))
def test_every_table_in_the_documents_is_made_from_the_committed_results(mark):
    found = shown(mark)
    assert found, "no document has its marks"
    assert set(found) == {tables.tables()[mark]}


def test_every_committed_result_is_in_some_table():
    names = {table.question for table in tables.TABLES.values()}
    for path in (ROOT / "benchmarks/results").glob("*.csv"):
        assert any(path.stem.startswith(name) for name in names), path.name


def make_root(folder: Path) -> Path:
    """A tree with the documents and without results."""
    (folder / "benchmarks/results").mkdir(parents=True)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "README.md", folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**ABOUT, **row}) + "\n" for row in rows))
    return path


def rewrite(root: Path, *sources: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/tables.py"), "--root", str(root), *map(str, sources)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def serving(model: str, rate: float = 1000.0) -> list[dict]:
    return [
        {"model": model, "layers": 2, "mode": "graphs", "load": load, "variant": variant, "round": number}
        | {"tokens_per_s": rate * ratio, "seconds": 1 / ratio, "ratio_to_stock": ratio}
        | ({"idle_seconds": 0.98} if variant == "idle" else {})
        for load in ("decode, 32 requests", "prefill")
        for number in range(3)
        for variant, ratio in (("stock", 1.0), ("idle", 0.99 + number / 100), ("plans", 0.9))
    ]


def test_results_of_several_calls(tmp_path):
    """The sums are right before a GPU sees this code; what has no rows stays "not measured"; a later result of a model counts."""
    root = make_root(tmp_path / "root")
    first, second = tmp_path / "first", tmp_path / "second.tgz"
    write(first / "serving_cost.jsonl", serving("M", 500.0) + serving("N"))
    rates = [
        {"model": "M", "mode": "full", "kind": "speed", "variant": "cells, 16 in flight", "round": number}
        | {"candidates_per_s": 3000.0 + number, "ratio_to_published": 320.0, "ratio_to_fastest": 100.0}
        for number in range(3)
    ]
    whole = {"model": "M", "mode": "full", "kind": "whole run", "variant": "28 prompt tokens", "seconds": 4.5, "candidates": 3000}
    whole |= {"transformers_seconds": 300.0, "ratio_to_published": 66.7}
    write(tmp_path / "search/search_speed.jsonl", [*rates, whole])
    kernel = [
        {"shape": "OLMoE 64/8", "num_tokens": 32, "variant": variant, "us_median": took, "floor_us": 2.0, "note": ""}
        | {"copy_gb_s": 2000.0, "launch_floor_us": 2.0}
        for variant, took in (
            ("ours, no directed token", 4.0),
            ("ours, all masked", 4.2),
            ("ours, all forced", 3.0),
            ("vllm topk_softmax", 4.0),
        )
    ]
    checks = [{"check": "kernels", "mode": "graphs", "result": "pass", "seconds": 3.0, "cases": 42, "worst_weight_error": 1.2e-7}]
    floors = [{"kind": "ceilings", "copy_gb_s": 2000.0, "matrix_tflop_s": 700.0}]
    floors += [{"kind": "workload", "model": "M", "workload": "decode", "floor_ms": 5.0, "measured_ms": 6.0}]
    floors[1] |= {"times_the_floor": 1.2, "largest_rest": "experts", "largest_rest_ms": 0.5}
    with tarfile.open(second, "w:gz") as packed:
        for name, rows in (("kernel_speed", kernel), ("routes_exact", checks), ("floors", floors), ("serving_cost", serving("M"))):
            packed.add(write(tmp_path / f"{name}.jsonl", rows), f"results/{name}.jsonl")
    earlier = [{**row, "us_median": 99.0} for row in kernel]
    done = rewrite(root, first, tmp_path / "search", write(tmp_path / "earlier/kernel_speed.jsonl", earlier).parent, second)
    assert done.returncode == 0, done.stderr
    (text,) = shown("gpu-serving", root)
    assert "| **M, 2 layers: decode, 32 requests** (stock: 1,000 tokens/s) |" in text
    assert f"| {VARIANTS['idle']} | 1.010 | 1.000 (0.990-1.010) | 0.990 |" in text
    assert f"| {VARIANTS['plans']} | 0.900 | 0.900 (0.900-0.900) | 0.882 |" in text  # of the same engine
    assert "| **N, 2 layers: prefill** (stock: 1,000 tokens/s) |" in text
    assert "Test GPU, driver 1, torch 2, Triton 3, vLLM 0.32.0, transformers 5, 2026-01-01, commit abc." in text
    (text,) = shown("gpu-search", root)
    assert "| M | cells, 16 in flight | 3001.0 (3000.0-3002.0) | 320.0 (320.0-320.0) |" in text
    assert "| M | whole F-SOUR attempt, 28 prompt tokens | 4.5 | 3000 | 300.0 | 66.7 |" in text
    assert "| OLMoE 64/8 | 32 | 4.0 | 4.0 (1.00) | 4.2 (1.05) | 3.0 (0.75) |" in shown("gpu-kernel", root)[0]
    assert "| OLMoE 64/8 | 32 | 2.0 | 4.0 | 4.2 | 3.0 | 4.0 (vllm topk_softmax) |" in shown("speed-table", root)[0]
    assert "| kernels | graphs | pass | cases 42, worst weight error 1.2e-07 |" in shown("gpu-checks", root)[0]
    assert "| M | decode | 5.0 | 6.0 | 1.2 | experts: 0.5 ms |" in shown("gpu-profile", root)[0]
    assert set(shown("search-speed", root)) == {NOT_MEASURED}
    (text,) = shown("gpu", root)
    assert "| on a GPU | Test GPU |" in text
    assert "| checks passed | 1 of 1 |" in text
    assert "a plan on every request: median (range) of all rounds | 0.900 (0.90-0.90) |" in text
    assert "a policy at every layer: median (range) of all rounds | not measured |" in text
    assert "| candidates/s over those of the published way, M (prompts in flight) | 320 (16) |" in text
    assert "| a whole F-SOUR attempt alone, M | 67 times as fast |" in text
    assert len(read_csv(root / "benchmarks/results/kernel_speed_test_gpu.csv")) == len(kernel)
    assert len(read_csv(root / "benchmarks/results/serving_cost_test_gpu.csv")) == len(serving("M") + serving("N"))
    before = {path: path.read_text() for path in tables.documents(root)}
    assert rewrite(root).returncode == 0
    assert before == {path: path.read_text() for path in tables.documents(root)}


def test_a_rehearsal_and_a_folder_without_results_are_refused(tmp_path):
    root = make_root(tmp_path / "root")
    good = tmp_path / "good"
    write(good / "serving_cost.jsonl", serving("M"))
    for name, rows in (("bad", [{**row, "rehearsal": True} for row in serving("M")]), ("empty", [])):
        write(tmp_path / name / "serving_cost.jsonl", rows)
        refused = rewrite(root, good, tmp_path / name)
        assert refused.returncode
        assert "rehearsal" in refused.stderr or "no result" in refused.stderr
        assert not list((root / "benchmarks/results").iterdir())


def test_a_result_that_was_cut_off_counts_as_far_as_it_came(tmp_path):
    path = write(tmp_path / "serving_cost.jsonl", serving("M"))
    path.write_text(path.read_text() + '{"model": "cut o')
    assert len(tables.load(tmp_path)["serving_cost"]) == len(serving("M"))


def test_the_share_of_the_arithmetic_bound(tmp_path):
    """A rate that is measured later, alone, fills the column; without one it says so."""
    root = make_root(tmp_path / "root")
    about = {"threads": 1, "dtype": "bfloat16", "device": "2 CPU cores (Test)"}
    speed = {"kind": "speed", "variant": "cells, 1 in flight", "round": 0, "candidates_per_s": 100.0, "tokens": 10}
    speed |= {"computed_tokens": 4, "ratio_to_one_by_one": 9.0, "ratio_to_batches": 3.0, **about}
    assert rewrite(root, write(tmp_path / "one/search_speed.jsonl", [speed]).parent).returncode == 0
    line = "| cells, 1 in flight | bfloat16 | 1 | 100.0 (100.0-100.0) | 9.0 (9.0-9.0) | 3.0 (3.0-3.0) | 40% | {} |"
    assert line.format(NOT_MEASURED) in shown("search-speed", root)[0]
    rate = {"kind": "rate", "round": 0, "matrix_gflop_s": 400 * search_speed.operations() / 1e9, **about}
    assert rewrite(root, write(tmp_path / "other/search_speed.jsonl", [rate]).parent).returncode == 0
    (text,) = shown("search-speed", root)
    assert line.format("25%") in text
    assert "400 candidates/s in bfloat16 with 1 thread." in text
