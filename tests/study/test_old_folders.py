"""Run folders that commit 3c3c03c wrote: they are read, give the figures that that commit gave, and go on.

`folders/` holds one small run of each kind on the lab model, whose language is made up; `golden/` what 3c3c03c made of them: the
commands' tables, the report's numbers, the lines of the lab tables. A run's own summary stands in its folder.
"""

from __future__ import annotations

import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import msgspec
import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.commands import show
from vllm_unsafe_routes.report import collect, load_runs
from vllm_unsafe_routes.study import summary
from vllm_unsafe_routes.study.campaign import CampaignError, read_lines
from vllm_unsafe_routes.study.records import (
    KINDS,
    Controls,
    Fsour,
    Recipe,
    Record,
    Rosais,
    Unknown,
    Work,
    entries,
    name_of_type,
    read,
)

LAB_RESULTS = Path(__file__).parents[2] / "benchmarks" / "lab_results.py"
FOLDERS, GOLDEN = Path(__file__).parent / "folders", Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in FOLDERS.iterdir())
REPORTED = ("rosais", "rosais-own-masks", "masks", "dataset-masks", "fsour-paper", "fsour-adaptive", "matrix", "no-verdict")
# Folder -> its summary, and the summary as text.
SUMMARISED = {
    "rosais": (summary.rosais_summary, show.rosais),
    "rosais-own-masks": (summary.rosais_summary, show.rosais),
    "masks": (summary.mask_summary, show.masks),
    "dataset-masks": (summary.mask_summary, show.masks),
    "no-verdict": (summary.mask_summary, show.masks),
    "fsour-paper": (summary.fsour_summary, lambda found: show.fsour(found, "paper")),
    "fsour-adaptive": (summary.fsour_summary, lambda found: show.fsour(found, "adaptive")),
    "matrix": (summary.matrix_summary, show.matrix),
}
KIND_READ = {summary.rosais_summary: Rosais, summary.fsour_summary: Fsour}


def plain(value):
    """As a file holds it."""
    return json.loads(json.dumps(value))


def golden(name):
    return json.loads((GOLDEN / name).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_written_as_it_was_read(name):
    lines = [fields for _, fields in read_lines(FOLDERS / name)]
    found = list(entries(FOLDERS / name))
    assert len(found) == len(lines) > 0
    for entry, line in zip(found, lines, strict=True):
        assert entry.key == line.pop("key")
        assert plain(msgspec.to_builtins(entry.record, str_keys=True)) == line


def test_every_type_is_there():
    found = {type(entry.record) for name in NAMES for entry in entries(FOLDERS / name)}
    # That commit kept no cost.
    assert found == set(KINDS.values()) - {Work, Controls, Recipe}


@pytest.mark.parametrize("name", SUMMARISED)
def test_summary_and_table_are_the_same(name):
    summarise, as_text = SUMMARISED[name]
    found = summarise(read(FOLDERS / name, KIND_READ.get(summarise, Record)))
    assert plain(found) == json.loads((FOLDERS / name / "summary.json").read_text())
    assert as_text(found).splitlines() == golden("tables.json")[name]


def test_the_report_s_numbers_are_the_same():
    report = collect(load_runs([FOLDERS / name for name in REPORTED]))
    for run in report["runs"]:
        # Times of the files, which are those of the checkout.
        del run["started"], run["last_record"]
    expected = golden("report.json")
    for run in expected["runs"]:
        if run["command"] == "rosais":
            run["judge"] = None  # It judged nothing, and the report of then named a judge.
    for part, numbers in expected.items():
        check_holds(plain(report)[part], numbers, part)


def check_holds(found, expected, where):
    """All that was there is there; what has been added since may stand beside it."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            check_holds(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for at, value in enumerate(expected):
            check_holds(found[at], value, f"{where}[{at}]")
    else:
        assert found == expected, where


def test_the_lines_of_the_lab_tables_are_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(LAB_RESULTS.parent))
    lab_results = SourceFileLoader("lab_results", str(LAB_RESULTS)).load_module()
    (tmp_path / "seed-0").symlink_to(FOLDERS)
    expected = golden("lab_results.json")
    assert plain(list(lab_results.rows_of(FOLDERS))) == expected["rows"]
    assert lab_results.tabulate([0], tmp_path, ("defences",), {"attacks": 3, "defences": 2}) == expected["lines"]


# What is no record.

ROSAIS = '{"type":"rosais","key":[0,"q"],"prompt":"q","category":"","seed":0,"clean":-1,"scores":{},"gains":{},"masks":{}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(ROSAIS.replace('"seed":0,', ""), "Object missing required field 'seed'", id="missing"),
        pytest.param(ROSAIS.replace('"seed":0,', '"seed":0,"speed":1,'), "Object contains unknown field 'speed'", id="unknown"),
        pytest.param(ROSAIS.replace('"seed":0,', '"seed":"x",'), "Expected 'int', got 'str' - at '$.seed'", id="other type"),
        pytest.param(
            ROSAIS.replace('"scores":{}', '"scores":{"a":1}'), "Expected 'int', got 'str'", id="a layer that is no number"
        ),
    ],
)
def test_a_record_that_does_not_fit_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "records.jsonl").write_text(f"{ROSAIS}\n{line}\n")
    with pytest.raises(CampaignError) as caught:
        list(entries(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / 'records.jsonl'}, line 2: record (0, 'q') of type 'rosais': ")
    assert message in str(caught.value)
    assert issubclass(CampaignError, RouteError)


def test_a_type_of_another_version_is_known_by_name_only(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"key":"x","type":"novelty","value":1}\n')
    ((key, record),) = entries(tmp_path)
    assert key == "x" and record == Unknown(type="novelty") and name_of_type(record) == "novelty"
    assert list(read(tmp_path, Rosais)) == []
