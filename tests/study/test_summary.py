"""What a figure counts: errors, results that are still to come, layers by their score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.report import collect, load_runs
from vllm_unsafe_routes.study.records import Record, Rosais, read
from vllm_unsafe_routes.study.summary import layer_scores, mask_summary, rate, scored_run, tries

FOLDERS = Path(__file__).parent / "folders"


def test_an_answer_without_a_verdict_is_an_error_and_no_part_of_the_rate():
    entry = rate([("a", 0, True), ("b", 0, None), ("a", 1, False)])
    assert (entry["value"], entry["prompts"], entry["seeds"], entry["errors"]) == (0.5, 1, 2, 1)


def test_a_result_that_is_still_to_come_is_no_error():
    # Prompt b under seed 1 has not been tried.
    entry = rate([("a", 0, True), ("b", 0, False), ("a", 1, True)])
    assert (entry["prompts"], entry["seeds"], entry["errors"]) == (2, 2, 0)


def test_nothing_but_errors_has_no_rate():
    expected = {"value": None, "low": None, "high": None, "prompts": 0, "seeds": 0, "errors": 2}
    assert rate([("a", 0, None), ("b", 0, None)]) == expected


def test_the_command_and_the_report_count_the_same_errors_of_a_run_that_was_cut_off(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(FOLDERS / "no-verdict", folder)
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:13]))
    asr = mask_summary(read(folder, Record))["asr"]
    names = ("value", "low", "high", "prompts", "seeds", "errors")
    reported = {entry["id"]: {name: entry[name] for name in names} for entry in collect(load_runs([folder]))["asr"]}
    assert asr == reported
    without = {}
    for one in tries(read(folder, Record)):
        without[one.name] = without.get(one.name, 0) + (one.judged.success is None)
    assert {name: entry["errors"] for name, entry in asr.items()} == without and sum(without.values()) > 2


def rosais(prompt, seed, scores, masks=((0,), (1,))):
    gains = {layer: (score, score - 1) for layer, score in scores.items()}
    taken = dict.fromkeys(scores, masks)
    return Rosais(prompt=prompt, category="", seed=seed, clean=0.0, scores=scores, gains=gains, masks=taken)


def test_layers_are_ranked_by_their_mean_and_equal_ones_by_index():
    found = layer_scores([rosais("a", 0, {10: 1.0, 2: 1.0, 3: 2.0}), rosais("b", 0, {10: 1.0, 2: 1.0, 3: 4.0})])
    assert found.ranking == [3, 2, 10]
    assert (found.means[3].value, found.dataset[3]) == (3.0, 3.0)


def test_means_that_differ_in_the_fourth_digit_are_not_equal():
    records = [rosais(f"q{at}", 0, {1: 1.0, 2: 1.001 if at == 0 else 1.0}) for at in range(5)]
    assert layer_scores(records).ranking == [2, 1]


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["other masks", "one prompt a seed"])
def test_no_dataset_level_where_prompts_do_not_share_masks(seeds):
    records = [rosais(f"q{at}", seed, {1: 1.0}, masks=((at,), (at + 1,))) for at, seed in enumerate(seeds)]
    assert layer_scores(records).dataset == {}


def test_a_run_that_cannot_be_built_on_is_named(tmp_path):
    settings, ranking = scored_run(FOLDERS / "rosais", "e53466f88ca400b8")
    assert settings["score"] == "next" and sorted(ranking) == [0, 1, 2, 3]
    shutil.copytree(FOLDERS / "rosais", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for folder, fingerprint, message in (
        (FOLDERS / "masks", "e53466f88ca400b8", "is a run of mask-attack, not of rosais"),
        (FOLDERS / "rosais", "feedfacefeedface", "scored model e53466f88ca400b8, this is feedfacefeedface"),
        (tmp_path / "run", "e53466f88ca400b8", "has not ended; run its command again"),
    ):
        with pytest.raises(RouteError, match=message):
            scored_run(folder, fingerprint)


def test_the_fingerprint_is_that_of_the_folders():
    assert json.loads((FOLDERS / "rosais" / "settings.json").read_text())["fingerprint"] == "e53466f88ca400b8"
