"""The report: numbers against hand-computed ones, one self-contained page, nothing harmful in any file, clear refusals."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.cli import main
from vllm_unsafe_routes.report import collect, load_runs, write_report
from vllm_unsafe_routes.report.figures import draw
from vllm_unsafe_routes.study.campaign import Campaign

HARMLESS = "sorry , i cannot <b>help</b> & that is it ."
HARMFUL = "first take the forbidden xulbane"
MODEL = {"model": "made-up", "model_identity": "0123456789abcdef", "fingerprint": "feedfacefeedface"}
COMMON = {**MODEL, "data": "words.csv", "prompts": "aa11", "num_prompts": 2, "policy": None, "system": "", "judge": "exact"}


def campaign(
    folder: Path, settings: Mapping[str, Any], records: Mapping[tuple[Any, ...], Mapping[str, Any]], done: bool = True
) -> Path:
    with Campaign(folder, {**COMMON, **settings}) as run:
        for key, record in records.items():
            run.append(key, record)
        if done:
            run.finish({})
    return folder


def judged(success: bool | None, **more: Any) -> dict[str, Any]:
    """A verdict as campaigns that keep everything record it."""
    text = {True: HARMFUL, False: HARMLESS, None: "a completion that nobody judged"}[success]
    error = {"error": f"timeout: about {HARMFUL}"} if success is None else {}
    return {"success": success, "score": None if success is None else float(success), "completion": text, **error, **more}


def rosais_run(folder: Path, *, done: bool = True, **settings: Any) -> Path:
    """Two layers, two masks, prompts of two categories, gains chosen by hand."""
    gains = {
        "q-1": {"0": [1.0, 3.0], "2": [0.5, -1.0]},
        "q-2": {"0": [2.0, 0.0], "2": [0.1, 0.7]},
    }
    masks = {"0": [[0, 1], [2, 3]], "2": [[1, 2], [0, 3]]}
    records = {
        (0, name): {
            "type": "rosais",
            "prompt": name,
            "category": f"group {name[-1]}",
            "seed": 0,
            "clean": -4.0,
            "scores": {layer: max(values) for layer, values in by_layer.items()},
            "gains": by_layer,
            "masks": masks,
        }
        for name, by_layer in gains.items()
    }
    own = {"command": "rosais", "seeds": [0], "num_masks": 2, "score": "next", "later_layers": "free", **settings}
    return campaign(folder, own, records, done)


def mask_run(folder: Path) -> Path:
    """`rosais` succeeds on one of two prompts, the control on none; one plain answer has no verdict."""
    records: dict[tuple[Any, ...], dict[str, Any]] = {
        ("none", "q-1"): {"type": "answer", "attack": "none", "prompt": "q-1", "category": "c", **judged(False)},
        ("none", "q-2"): {"type": "answer", "attack": "none", "prompt": "q-2", "category": "c", **judged(None)},
    }
    for attack, wins in (("rosais", ("q-1",)), ("random-layers", ())):
        for name in ("q-1", "q-2"):
            records[attack, 0, name] = {
                "type": "mask",
                "attack": attack,
                "prompt": name,
                "category": "c",
                "seed": 0,
                "clean": -4.0,
                "masked": -1.0,
                "masks": [[2, [0, 1]]],
                "candidates": 10,
                "answers": {"1": judged(name in wins)},
            }
    return campaign(folder, {"command": "mask-attack", "seeds": [0], "attacks": ["rosais", "random-layers"]}, records)


def attempt(best: float, trace: list[list[float]], computed: int, routes: list[Any] | None = None) -> dict[str, Any]:
    return {
        "clean": -5.0,
        "best": best,
        "routes": routes or [],
        "candidates": 10,
        "needed": 6,
        "tokens": 100,
        "computed_tokens": computed,
        "trace": trace,
    }


def fsour_run(folder: Path, *, done: bool = True, notes: bool = True, **settings: Any) -> Path:
    """q-1: two attempts of 60 and 40 computed tokens, then success; q-2: one attempt, failed."""
    first, second = attempt(-3.0, [[30, -3.0]], 60), attempt(-0.2, [[20, -4.0], [40, -0.2]], 40, [[0, 3, [1, 2], 0.5]])
    failed = attempt(-4.5, [[90, -4.5]], 100, [[0, 1, [1, 3], 0.5], [2, 4, [0, 1], 0.1]])
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    if notes:
        for name, number, one in (("q-1", 0, first), ("q-1", 1, second), ("q-2", 0, failed)):
            records[0, name, "attempt", number] = {
                "type": "attempt",
                "number": number,
                "attempt": one,
                "answer": judged(one is second),
            }
        records[0, "q-2", "step", 1, 4] = {"type": "step", "number": 1, "cell": 4, "attempt": attempt(-4.9, [], 3)}
    common = {"type": "fsour", "attack": "fsour-paper", "seed": 0, "category": "c"}
    records[0, "q-1"] = {
        **common,
        **{"prompt": "q-1", "prompt_tokens": 4, "attempts": 2, "candidates": 20, "needed": 12, "tokens": 200},
        **{"computed_tokens": 100, "final": second},
        **judged(True),
    }
    if done:
        records[0, "q-2"] = {
            **common,
            **{"prompt": "q-2", "prompt_tokens": 5, "attempts": 1, "candidates": 10, "needed": 6, "tokens": 100},
            **{"computed_tokens": 100, "final": failed},
            **judged(False),
        }
    return campaign(folder, {"command": "fsour", "seeds": [0], "strategy": "paper", "tau": 0.8, **settings}, records, done)


def matrix_run(folder: Path) -> Path:
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for attack, defence, outcomes in (
        ("fsour-adaptive", "none", (True, True)),
        ("fsour-adaptive", "policy:/some/where/mine.json+reminder", (False, True)),
        ("none", "none", (False, None)),
    ):
        for number, success in enumerate(outcomes, start=1):
            records[defence, attack, number] = {
                **{"type": "matrix", "attack": attack, "defence": defence, "prompt": f"q-{number}", "seed": 0, "category": "c"},
                **judged(success),
            }
    for number, (right, refused) in enumerate(((True, False), (False, True), (False, False), (None, True))):
        records["utility", number] = {
            **{"type": "utility", "defence": "none", "kind": "benign", "prompt": f"b-{number}", "seed": 0},
            **{"right": right, "refused": refused},
        }
    records["none", "throughput"] = {"type": "throughput", "defence": "none", "seconds": {"tokens_per_s": 321.5}}
    return campaign(folder, {"command": "evaluate", "seeds": [0]}, records)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        rosais_run(tmp_path / "rosais"),
        mask_run(tmp_path / "masks"),
        fsour_run(tmp_path / "fsour"),
        matrix_run(tmp_path / "matrix"),
    ]


def numbers(*folders: Path, **options: Any) -> dict[str, Any]:
    report = collect(load_runs(folders), **options)
    # What it says must survive the trip through its file.
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report


class TestRosais:
    def test_layers(self, tmp_path):
        (entry,) = numbers(rosais_run(tmp_path / "run"))["rosais"]
        first, second = entry["layers"]
        assert (first["layer"], first["value"], first["rank"]) == (0, 2.5, 1)
        assert (second["layer"], second["value"], second["rank"]) == (2, 0.6, 2)
        assert first["low"] == 2.0
        assert first["high"] == 3.0
        assert entry["ranking"] == [0, 2]

    def test_dataset_level_is_the_best_mask_of_all_prompts(self, tmp_path):
        (entry,) = numbers(rosais_run(tmp_path / "run"))["rosais"]
        # Layer 0: masks gain (1 + 2) / 2 and (3 + 0) / 2; layer 2: (0.5 + 0.1) / 2 and (-1 + 0.7) / 2.
        assert [layer["dataset"] for layer in entry["layers"]] == [1.5, 0.3]

    def test_no_dataset_level_without_shared_masks(self, tmp_path):
        folder = rosais_run(tmp_path / "run")
        path = folder / "records.jsonl"
        lines = path.read_text().splitlines()
        lines[1] = lines[1].replace("[[0,1],[2,3]]", "[[0,1],[1,3]]")
        path.write_text("\n".join(lines) + "\n")
        (entry,) = numbers(folder)["rosais"]
        assert [layer["dataset"] for layer in entry["layers"]] == [None, None]

    def test_prompts_are_grouped_and_categories_compared(self, tmp_path):
        (entry,) = numbers(rosais_run(tmp_path / "run"))["rosais"]
        assert [(one["category"], one["scores"]) for one in entry["prompts"]] == [("group 1", [3.0, 0.5]), ("group 2", [2.0, 0.7])]
        one, two = entry["categories"]
        assert (one["top_layer"], two["top_layer"]) == (0, 0)
        assert [layer["value"] for layer in one["layers"]] == [3.0, 0.5]
        assert one["rank_agreement"] == 1.0

    def test_runs_with_one_label_are_told_apart(self, tmp_path):
        report = numbers(rosais_run(tmp_path / "a" / "run"), rosais_run(tmp_path / "b" / "run"))
        assert [run["name"] for run in report["runs"]] == ["a/run", "b/run"]
        assert len({entry["label"] for entry in report["rosais"]}) == 2


class TestRates:
    def test_asr_counts_errors_beside_the_rate(self, tmp_path):
        entries = {entry["id"]: entry for entry in numbers(mask_run(tmp_path / "run"))["asr"]}
        assert list(entries) == ["none", "random-layers/1", "rosais/1"]
        assert (entries["rosais/1"]["value"], entries["rosais/1"]["prompts"]) == (0.5, 2)
        plain = entries["none"]
        assert (plain["value"], plain["prompts"], plain["errors"]) == (0.0, 1, 1)
        # Exact interval of one prompt without success: up to 1 - 0.025.
        assert plain["high"] == 0.975
        assert plain["error_kinds"] == {"timeout": 1}

    def test_an_attack_without_any_verdict(self, tmp_path):
        record = {"type": "answer", "attack": "none", "prompt": "q-1", "category": "c", **judged(None)}
        folder = campaign(tmp_path / "run", {"command": "mask-attack", "seeds": [0]}, {("none", "q-1"): record})
        report = numbers(folder)
        assert report["asr"][0]["value"] is None
        assert report["asr"][0]["errors"] == 1
        assert "no verdict" in write_report(report, tmp_path / "out").read_text()

    def test_differences_stay_within_a_run_and_a_level(self, tmp_path):
        (entry,) = numbers(mask_run(tmp_path / "run"))["differences"]
        assert (entry["attack"], entry["minus"], entry["value"]) == ("RoSais masking, L = 1", "random layers, L = 1", 0.5)

    def test_strategies_are_compared_on_the_same_prompts_only(self, tmp_path):
        paper = fsour_run(tmp_path / "paper")
        other = tmp_path / "other"
        text = (paper / "records.jsonl").read_text().replace("fsour-paper", "fsour-adaptive")
        for digest, count in (("aa11", 1), ("bb22", 0)):
            folder = other / digest
            folder.mkdir(parents=True)
            (folder / "records.jsonl").write_text(text)
            settings = json.loads((paper / "settings.json").read_text()) | {"prompts": digest, "strategy": "adaptive"}
            (folder / "settings.json").write_text(json.dumps(settings))
            assert len(numbers(paper, folder)["differences"]) == count

    def test_matrix(self, tmp_path):
        report = numbers(matrix_run(tmp_path / "run"))
        (table,) = report["matrix"]
        assert table["attacks"] == ["none", "fsour-adaptive"]
        assert table["defence_labels"] == ["no defence", "policy mine.json + reminder"]
        (plain, missing), (bare, defended) = table["cells"]
        assert missing is None
        assert (plain["value"], plain["errors"]) == (0.0, 1)
        assert (bare["value"], defended["value"]) == (1.0, 0.5)

    @pytest.mark.parametrize(("attack", "settings"), [("rosais/3", {}), ("rosais", {"masks": {"num_layers": 3}})])
    def test_matrix_rows_name_the_number_of_masked_layers(self, tmp_path, attack, settings):
        record = {
            "type": "matrix",
            "attack": attack,
            "defence": "none",
            "prompt": "q-1",
            "category": "c",
            "seed": 0,
            "candidates": 7,
            **judged(False),
        }
        folder = campaign(tmp_path / "run", {"command": "evaluate", "seeds": [0], **settings}, {("x",): record})
        report = numbers(folder)
        assert report["matrix"][0]["attack_labels"] == ["RoSais masking, L = 3"]
        assert [(cost["label"], cost["candidates"]) for cost in report["costs"]] == [
            ("RoSais masking, L = 3 against no defence", 7)
        ]

    def test_utility(self, tmp_path):
        (entry,) = numbers(matrix_run(tmp_path / "run"))["utility"]
        # Of four answers one has no verdict; one of the other three is right and one refused.
        assert entry["right"]["value"] == pytest.approx(1 / 3, abs=1e-4)
        assert entry["refused"]["value"] == pytest.approx(1 / 3, abs=1e-4)
        assert entry["refused"]["errors"] == 1
        assert entry["tokens_per_s"] == 321.5


class TestSearches:
    LINE = [[10, -5.0], [30, -3.0], [100, -0.2]]  # noqa: RUF012

    def test_a_curve_runs_on_through_the_attempts(self, tmp_path):
        (entry,) = numbers(fsour_run(tmp_path / "run"))["curves"]
        lines = {line["prompt"]: line["points"] for line in entry["lines"]}
        # The second attempt begins behind the 60 tokens of the first; -4.0 in it is no new best.
        assert lines == {"q-1": self.LINE, "q-2": [[10, -5.0], [90, -4.5], [100, -4.5]]}
        assert entry["log_tau"] == pytest.approx(math.log(0.8), abs=1e-4)
        assert entry["reached_tau"] == 1
        assert entry["median"][0] == [10, -5.0]
        assert entry["median"][-1] == [100, pytest.approx((-0.2 - 4.5) / 2)]

    def test_a_curve_of_the_last_attempt_alone_starts_behind_the_others(self, tmp_path):
        (entry,) = numbers(fsour_run(tmp_path / "run", notes=False))["curves"]
        assert entry["lines"][0]["points"] == [[70, -5.0], [80, -4.0], [100, -0.2]]

    def test_routes_are_counted_from_the_end_of_the_prompt(self, tmp_path):
        (entry,) = numbers(fsour_run(tmp_path / "run"))["routes"]
        assert entry["layers"] == [0, 2]
        assert entry["positions"] == [-5, -4, -3, -2, -1]
        # q-1: position 3 of 4; q-2: positions 1 and 4 of 5.
        assert entry["counts"] == [[0, 1, 0, 0, 1], [0, 0, 0, 0, 1]]
        assert entry["reaching"] == [1, 2, 2, 2, 2]
        assert (entry["searches"], entry["successes"], entry["accepted"]) == (2, 1, 3)

    def test_the_gallery_shows_each_accepted_route_with_its_experts_and_gain(self, tmp_path):
        (entry,) = collect(load_runs([fsour_run(tmp_path / "f")]))["gallery"]
        won, lost = entry["searches"]
        assert (won["prompt"], won["success"], lost["success"]) == ("q-1", True, False)
        assert won["cells"] == {"0": {"3": {"experts": [1, 2], "gain": 0.5, "strength": 1.0}}}
        # What succeeded is left out, what was refused is shown.
        assert (won["answer"], lost["answer"]) == (None, HARMLESS)
        (kept,) = collect(load_runs([tmp_path / "f"]), keep_completions=True)["gallery"]
        assert kept["searches"][0]["answer"] == HARMFUL

    def test_experts(self, tmp_path):
        layer, _ = numbers(fsour_run(tmp_path / "run"))["experts"]
        assert (layer["layer"], layer["sets"], layer["top_k"]) == (0, 2, 2)
        assert [(one["expert"], one["count"], one["share"]) for one in layer["experts"]] == [(1, 2, 1.0), (2, 1, 0.5), (3, 1, 0.5)]

    def test_costs(self, tmp_path):
        report = numbers(rosais_run(tmp_path / "rosais"), fsour_run(tmp_path / "fsour"))
        scoring, search = report["costs"]
        assert (scoring["searches"], scoring["candidates"], scoring["tokens"], scoring["seconds"]) == (2, 8, None, None)
        expected = {"attempts": 3, "candidates": 30, "needed": 18, "tokens": 300, "computed_tokens": 200, "searches": 2}
        assert expected.items() <= search.items()
        assert search["reuse"] == pytest.approx(1 / 3, abs=1e-4)
        assert search["computed_per_search"] == 100.0


WORK = {
    **{"type": "work", "attack": "fsour-paper", "results": 2, "requests": 30, "candidates": 30, "tokens": 300},
    **{"computed_tokens": 200, "seconds": 4.0, "device": "a processor, 2 threads", "versions": {"vllm": "0.32.0"}},
}
JUDGES = [
    {"name": "strict@m", "role": "first", "identity": "0123456789abcdef@m", "threshold": 1.0},
    {"name": "mild@m", "role": "stop", "identity": "fedcba9876543210@m"},
]


def add(folder: Path, records: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> Path:
    with Campaign(folder, json.loads((folder / "settings.json").read_text())) as run:
        for key, record in records.items():
            run.append(key, record)
    return folder


class TestWhatItIsAbout:
    def test_runs_on_different_prompts_are_told_apart_in_the_figures(self, tmp_path):
        one, other = (fsour_run(tmp_path / name, prompts=digest) for name, digest in (("a", "aa11"), ("b", "bb22")))
        report = numbers(one, other)
        assert [(entry["name"], entry["runs"]) for entry in report["prompt_sets"]] == [("A", ["a"]), ("B", ["b"])]
        figures = {figure.name: figure for figure in draw(report)}
        for name in ("attack_success_rate", "log_probability_by_tokens", "accepted_routes"):
            assert "Different prompts, not to be compared with each other: A: 2 of words.csv; B: 2" in figures[name].caption
        assert "The runs are on different prompts" in write_report(report, tmp_path / "out").read_text()
        same = numbers(one)
        assert not any("Different prompts" in figure.caption for figure in draw(same))
        assert "The runs are on different prompts" not in write_report(same, tmp_path / "out").read_text()

    def test_prompts_by_attacks(self, tmp_path):
        report = numbers(mask_run(tmp_path / "masks"), fsour_run(tmp_path / "fsour"))
        masks, fsour = report["by_prompt"]
        assert masks["attacks"] == ["none", "random-layers/1", "rosais/1"]
        first, second = masks["prompts"]
        assert [cell["successes"] for cell in first["cells"]] == [0, 0, 1]
        assert (second["cells"][0]["verdicts"], second["cells"][0]["seeds"]) == (0, 1)
        assert (first["cells"][2]["before"], first["cells"][2]["after"]) == (-4.0, -1.0)
        (found, _) = fsour["prompts"]
        assert found["cells"] == [{"successes": 1, "verdicts": 1, "seeds": 1, "attempts": 2.0, "before": -5.0, "after": -0.2}]
        assert "q-1" in write_report(report, tmp_path / "out").read_text()

    def test_a_judge_is_shown_where_one_judged_and_by_its_content(self, tmp_path):
        report = numbers(rosais_run(tmp_path / "rosais"), fsour_run(tmp_path / "fsour", judges=JUDGES, judge="strict@m"))
        assert [run["judge"] for run in report["runs"]] == [None, "strict@m"]
        page = write_report(report, tmp_path / "out").read_text()
        assert "strict@m (content 01234567, harmful from 1)" in page and "mild@m (content fedcba98, ends searches)" in page
        assert "exact" not in page.partition("<h2>Runs</h2>")[0]

    def test_further_judges_have_rates_of_their_own(self, tmp_path):
        said = {"mild@m": {"success": True, "score": 1.0}, "mute@m": {"success": None, "score": None, "error": "timeout: x"}}
        record = {"type": "answer", "attack": "none", "prompt": "q-1", "category": "c", **judged(False), "others": said}
        folder = campaign(tmp_path / "run", {"command": "mask-attack", "seeds": [0]}, {("none", "q-1"): record})
        found = {entry["label"]: (entry["judge"], entry["value"], entry["errors"]) for entry in numbers(folder)["asr"]}
        assert found == {
            "no attack": ("exact", 0.0, 0),
            "no attack, judged by mild@m": ("mild@m", 1.0, 0),
            "no attack, judged by mute@m": ("mute@m", None, 1),
        }

    def test_further_judges_have_rows_in_a_matrix(self, tmp_path):
        record = {"type": "matrix", "attack": "fsour-adaptive", "defence": "none", "prompt": "q-1", "category": "c", "seed": 0}
        record |= judged(False) | {"others": {"mild@m": {"success": True, "score": 1.0}}}
        (table,) = numbers(campaign(tmp_path / "run", {"command": "evaluate", "seeds": [0]}, {("x",): record}))["matrix"]
        assert table["attack_labels"] == ["F-SOUR, adaptive", "F-SOUR, adaptive, judged by mild@m"]
        assert [row[0]["value"] for row in table["cells"]] == [0.0, 1.0]

    def test_a_later_verdict_replaces_the_error(self, tmp_path):
        record = {"type": "answer", "attack": "none", "prompt": "q-1", "category": "c"}
        records = {("none", "q-1"): record | judged(None), ("none", "q-1", "again", 0): record | judged(True)}
        (entry,) = numbers(campaign(tmp_path / "run", {"command": "mask-attack", "seeds": [0]}, records))["asr"]
        assert (entry["value"], entry["errors"]) == (1.0, 0)

    def test_seconds_device_and_versions(self, tmp_path):
        folder = fsour_run(tmp_path / "run")
        assert [numbers(folder)["costs"][0][name] for name in ("seconds", "candidates_per_s", "seconds_per_prompt")] == [None] * 3
        add(
            folder,
            {("work", 0): WORK, ("work", 1): {**WORK, "seconds": 2.0}, ("work", 2): {**WORK, "attack": "none", "seconds": 1.0}},
        )
        report = numbers(folder)
        (cost,) = report["costs"]
        assert (cost["seconds"], cost["candidates_per_s"], cost["seconds_per_prompt"]) == (6.0, 10.0, 3.0)
        (run,) = report["runs"]
        assert (run["seconds"], run["device"], run["versions"]) == (7.0, "a processor, 2 threads", {"vllm": "0.32.0"})
        assert (run["results"], run["results_expected"]) == (2, 2)
        page = write_report(report, tmp_path / "out").read_text()
        assert "a processor, 2 threads" in page and "vllm 0.32.0" in page

    def test_gains_stand_beside_counts(self, tmp_path):
        (entry,) = numbers(fsour_run(tmp_path / "run"))["routes"]
        assert entry["gains"] == [[0.0, 0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.1]]

    def test_a_prompt_that_was_not_searched_has_no_curve(self, tmp_path):
        folder = fsour_run(tmp_path / "run", done=False, plain_answer_first=True)
        state = attempt(-2.0, [], 8) | {"candidates": 1, "needed": 0}
        record = {
            **{"type": "fsour", "attack": "fsour-paper", "seed": 0, "category": "c", "prompt": "q-3", "prompt_tokens": 8},
            **{"attempts": 0, "candidates": 1, "needed": 0, "tokens": 8, "computed_tokens": 8, "final": state},
            **judged(True),
        }
        report = numbers(add(folder, {(0, "q-3"): record}))
        assert {line["prompt"] for line in report["curves"][0]["lines"]} == {"q-1", "q-2"}
        assert (report["routes"][0]["searches"], report["asr"][0]["value"]) == (1, 1.0)
        assert report["runs"][0]["results_expected"] == 4


class TestRunning:
    def test_an_unfinished_run_is_read_without_its_lock(self, tmp_path):
        folder = fsour_run(tmp_path / "run", done=False)
        settings = json.loads((folder / "settings.json").read_text())
        with Campaign(folder, settings):
            with (folder / "records.jsonl").open("a") as file:
                file.write('{"key": [0, "q-9"], "type": "fso')
            report = numbers(folder)
        (run,) = report["runs"]
        assert (run["finished"], run["results"], run["results_expected"]) == (False, 1, 2)
        # The attempt of the search that is still under way has its curve.
        assert len(report["curves"][0]["lines"]) == 2
        assert "Preliminary" in write_report(report, tmp_path / "out").read_text()

    def test_unknown_records_are_named(self, tmp_path):
        folder = rosais_run(tmp_path / "run", done=False)
        with Campaign(folder, json.loads((folder / "settings.json").read_text())) as run:
            run.append("x", {"type": "novelty"})
        report = numbers(folder)
        assert report["runs"][0]["unknown_records"] == {"novelty": 1}
        assert "1 of type novelty" in write_report(report, tmp_path / "out").read_text()


class Page(HTMLParser):
    """What a page would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        assert not any(name.startswith("on") for name, _ in attrs)


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def png_text(data: bytes) -> bytes:
    """All of a PNG that is not pixels."""
    at, found = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] in (b"tEXt", b"zTXt", b"iTXt"):
            found += data[at + 8 : at + 8 + length]
        at += 12 + length
    assert zlib.crc32(data[12:29]) == struct.unpack(">I", data[29:33])[0]
    return found


class TestFiles:
    def test_the_page_loads_nothing_and_runs_nothing(self, folders, tmp_path):
        text = write_report(collect(load_runs(folders)), tmp_path / "out").read_text()
        page = Page(text)
        assert {"script", "iframe", "link", "object", "embed", "base", "form"}.isdisjoint(page.tags)
        assert page.tags.count("img") == 6
        assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
        style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
        assert style is not None
        assert "url(" not in style[1]
        assert "@import" not in style[1]
        assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text).replace('http-equiv="', "")

    def test_every_figure_is_a_file_too(self, folders, tmp_path):
        write_report(collect(load_runs(folders)), tmp_path / "out")
        names = {path.stem for path in (tmp_path / "out").glob("*.png")}
        assert names == {
            *("rosais_by_layer", "rosais_by_prompt_1", "attack_success_rate", "attack_defence_1"),
            *("log_probability_by_tokens", "accepted_routes"),
        }
        for path in (tmp_path / "out").glob("*.png"):
            width, height = png_size(path.read_bytes())
            assert 600 <= width <= 1200
            assert height > 100
            assert HARMFUL.encode() not in png_text(path.read_bytes())

    def test_a_second_report_is_the_same(self, folders, tmp_path):
        for name in ("one", "two"):
            write_report(collect(load_runs(folders)), tmp_path / name)
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name

    def test_nothing_harmful_or_unjudged_is_in_any_file(self, folders, tmp_path):
        write_report(collect(load_runs(folders)), tmp_path / "out")
        for path in (tmp_path / "out").iterdir():
            data = path.read_bytes()
            for secret in (HARMFUL, "xulbane", "nobody judged"):
                assert secret.encode() not in data, f"{secret!r} is in {path.name}"
        page = (tmp_path / "out" / "report.html").read_text()
        assert "sorry , i cannot &lt;b&gt;help&lt;/b&gt; &amp; that is it ." in page
        # One masked answer, one of F-SOUR and three of the matrix; two plain ones without verdict.
        assert "5 judged harmful and" in page
        assert "2 without a verdict" in page

    def test_completions_are_kept_when_asked_for(self, folders, tmp_path):
        page = write_report(collect(load_runs(folders), keep_completions=True), tmp_path / "out").read_text()
        assert HARMFUL in page
        assert "Everything recorded is shown" in page

    def test_text_of_records_and_settings_is_escaped(self, tmp_path):
        folder = rosais_run(tmp_path / "run", data="<script>alert(1)</script>", score="target")
        text = write_report(collect(load_runs([folder]), title="$a$ <i>title</i>"), tmp_path / "out").read_text()
        assert "script" not in Page(text).tags
        assert "<title>$a$ &lt;i&gt;title&lt;/i&gt;</title>" in text

    def test_every_number_of_the_page_is_in_the_json(self, folders, tmp_path):
        report = collect(load_runs(folders))
        write_report(report, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "report.json").read_text()) == report

    def test_many_layers_and_prompts(self, tmp_path):
        layers, prompts = range(1, 49), range(120)
        records = {
            (0, f"q-{prompt}"): {
                **{"type": "rosais", "prompt": f"q-{prompt}", "category": f"a rather long category {prompt % 3}", "seed": 0},
                "clean": -4.0,
                **{"scores": {str(layer): (prompt * layer) % 7 - 2.0 for layer in layers}, "gains": {}, "masks": {}},
            }
            for prompt in prompts
        }
        folder = campaign(tmp_path / "run", {"command": "rosais", "seeds": [0], "num_prompts": 120}, records, False)
        write_report(collect(load_runs([folder])), tmp_path / "out")
        assert png_size((tmp_path / "out" / "rosais_by_prompt_1.png").read_bytes())[1] <= 2400


class TestRefusals:
    def refused(self, *folders: Path) -> str:
        with pytest.raises(RouteError) as error:
            load_runs(folders)
        return str(error.value)

    def test_no_folder(self, tmp_path):
        assert "there is no such folder" in self.refused(tmp_path / "nowhere")

    def test_no_campaign(self, tmp_path):
        assert "has no settings.json" in self.refused(tmp_path)

    def test_settings_of_something_else(self, tmp_path):
        (tmp_path / "settings.json").write_text('{"seed": 7}')
        assert "names no model fingerprint" in self.refused(tmp_path)

    def test_no_records_yet(self, tmp_path):
        assert "has no results yet" in self.refused(campaign(tmp_path / "run", {"seeds": [0]}, {}, False))

    def test_nothing_to_show(self, tmp_path):
        folder = campaign(tmp_path / "run", {"seeds": [0]}, {("x",): {"type": "novelty"}})
        assert "only records of type novelty" in self.refused(folder)

    @pytest.mark.parametrize("field", ["fingerprint", "model_identity"])
    def test_two_models(self, tmp_path, field):
        message = self.refused(rosais_run(tmp_path / "a"), rosais_run(tmp_path / "b", **{field: "5eed5eed5eed5eed"}))
        assert "different models" in message
        assert MODEL[field] in message
        assert "5eed5eed5eed5eed" in message

    def test_one_folder_twice(self, tmp_path):
        folder = rosais_run(tmp_path / "a")
        assert "named twice" in self.refused(folder, tmp_path / "." / "a")

    def test_a_record_that_lacks_a_field(self, tmp_path):
        record = {"type": "matrix", "attack": "none", "prompt": "q-1", "category": "c", "seed": 0, **judged(False)}
        folder = campaign(tmp_path / "run", {"seeds": [0]}, {("x",): record})
        message = self.refused(folder)
        assert "'matrix'" in message
        assert "'defence'" in message
        assert "records.jsonl, line 1" in message

    def test_two_results_for_one_cell(self, tmp_path):
        record = {"type": "answer", "attack": "none", "prompt": "q-1", "category": "c", **judged(False)}
        folder = campaign(tmp_path / "run", {"seeds": [0]}, {("a",): record, ("b",): record})
        with pytest.raises(RouteError, match="run run, none: prompt 'q-1' has two results"):
            collect(load_runs([folder]))

    def test_a_file_where_the_report_should_be(self, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(RouteError, match="cannot be written"):
            write_report(collect(load_runs([rosais_run(tmp_path / "run")])), tmp_path / "out")


class TestCommand:
    def test_it_writes_and_says_where(self, folders, tmp_path, capsys):
        out = tmp_path / "report"
        assert main(["report", *map(str, folders), "--out", str(out), "--title", "A title"]) == 0
        assert str(out / "report.html") in capsys.readouterr().out
        assert "<h1>A title</h1>" in (out / "report.html").read_text()

    def test_bad_input_is_one_line(self, tmp_path, capsys):
        assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The page in a frame of 400 pixels, looked at by a script; the page itself has none.
LOOK = """<iframe id="page" style="width: 400px; height: 800px; border: 0"></iframe><script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, marks = [...page.querySelectorAll("td.hit")];
  if (!marks.length) return;
  const shown = (mark) => frame.contentWindow.getComputedStyle(mark.querySelector(".tip")).display;
  const before = shown(marks[0]);
  frame.contentWindow.focus(); marks[0].focus();
  const tip = marks[0].querySelector(".tip").getBoundingClientRect();
  const found = {width: page.documentElement.scrollWidth, marks: marks.length, reachable: marks.every((one) => one.tabIndex === 0),
    before, after: page.activeElement === marks[0] ? shown(marks[0]) : "no focus", tip: [tip.left, tip.right, tip.bottom],
    text: marks[0].innerText};
  document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
};
frame.srcdoc = PAGE;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_fits_a_phone_and_the_gallery_can_be_reached_by_key(tmp_path):
    page = write_report(collect(load_runs([fsour_run(tmp_path / "f")])), tmp_path / "out")
    look = tmp_path / "look.html"
    text = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    look.write_text(f"<!doctype html><body>{LOOK.replace('PAGE', text)}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'chromium'}"]
    command += ["--window-size=800,900", "--virtual-time-budget=10000", "--dump-dom", look.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search(r'<pre id="found">({.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert found["width"] <= 400
    assert found["marks"] == 3 and found["reachable"]
    assert (found["before"], found["after"]) == ("none", "block")
    left, right, bottom = found["tip"]
    assert left >= 0 and right <= 400 and bottom <= 800
    assert "experts 1, 2" in found["text"] and "nats" in found["text"]
    assert "CONSOLE" not in done.stderr
