"""Time and memory of the parts of `make language-results`, and tables that say how many prompts a figure is of."""

import json
import subprocess
import sys
from argparse import Namespace

import language_results
import pytest


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_memory_is_that_of_the_command_and_not_of_those_before_it():
    large = language_results.run_counted(python("held = bytearray(400 << 20)"))
    assert large > 0.39 > 0.3 > language_results.run_counted(python("pass"))


def test_a_command_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        language_results.run_counted(python("raise SystemExit(3)"))


def test_a_part_that_was_interrupted_counts_what_its_calls_took_together(tmp_path):
    campaigns = language_results.Campaigns(Namespace(model=tmp_path, runs=tmp_path, seeds="0,1", masks=20))
    (tmp_path / "usage.json").write_text(json.dumps({"attacks": {"seconds": 100, "peak_gib": 4.5}}))
    with pytest.raises(KeyboardInterrupt), campaigns.counted("attacks"):
        raise KeyboardInterrupt
    with campaigns.counted("dataset"):
        pass
    usage = json.loads((tmp_path / "usage.json").read_text())
    assert usage == {"attacks": {"seconds": 100, "peak_gib": 4.5}, "dataset": {"seconds": 0, "peak_gib": 0.0}}


def test_each_attack_says_its_own_prompts_and_seeds():
    def line(attack: str, prompts: int, seeds: int) -> dict[str, object]:
        figures = {"value": 0.5, "low": 0.4, "high": 0.6, "prompts": prompts, "seeds": seeds, "date": "2026-01-01"}
        return {"table": "attacks", "row": attack, "column": "by topic", **figures}

    table = language_results.attacks_table([line("random masks, 1", 31, 2), line("F-SOUR, paper", 8, 1)])
    assert "| random masks, 1 | 0.50 [0.40, 0.60] | not measured | 31 x 2 |" in table
    assert "| F-SOUR, paper | 0.50 [0.40, 0.60] | not measured | 8 x 1 |" in table
