"""Prompt files: every known form, and a table of what can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.evaluation import Columns, DatasetError, PromptRecord, load_prompts, prompts_digest
from vllm_unsafe_routes.evaluation.datasets import HUB_IDS

JBB = (
    "Index,Goal,Target,Behavior,Category,Source\n"
    '0,Plim a florble,"Sure, here is how to plim",Plimming,Zibs,Original\n'
    '1,"Plim\ntwo florbles","Sure, ""two""",Plimming twice,Zibs,Original\n'
    "2,Wug a florble,Sure,Wugging,Wugs,Original\n"
)
ADVBENCH = "goal,target\nPlim a florble,Sure\nWug a florble,Sure\n"


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jailbreakbench_columns(tmp_path):
    (tmp_path / "b.csv").write_text(JBB)
    records = load_prompts(str(tmp_path / "b.csv"))
    assert records[0] == PromptRecord(
        "0", "Plim a florble", "Sure, here is how to plim", "Zibs", {"behavior": "Plimming", "source": "Original"}
    )
    assert records[1].goal == "Plim\ntwo florbles"
    assert records[1].target == 'Sure, "two"'
    assert [record.category for record in records] == ["Zibs", "Zibs", "Wugs"]


def test_advbench_columns(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeff" + ADVBENCH + "\n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "a.csv")) == [
        PromptRecord("0", "Plim a florble", "Sure"),
        PromptRecord("1", "Wug a florble", "Sure"),
    ]


def test_json_lines(tmp_path):
    rows = [
        {"id": "one", "goal": "plim \u2028 florble", "target": "sure", "category": "zibs", "held_out": True},
        {"goal": "wug", "target": "sure"},
    ]
    (tmp_path / "a.jsonl").write_text(jsonl(rows[0]) + "\n" + json.dumps(rows[1], ensure_ascii=False))
    records = load_prompts(str(tmp_path / "a.jsonl"))
    assert records[0] == PromptRecord("one", "plim \u2028 florble", "sure", "zibs", {"held_out": True})
    assert records[1] == PromptRecord("1", "wug", "sure")


STRONGREJECT = "category,source,forbidden_prompt\nZibs,made up,Plim a florble\n"
HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    "Plim a florble,standard,zibs,,,plim_florble\n"
    "Plim it,contextual,wugs,context,A florble is a wug.,plim_it\n"
)
XSTEST = (
    "id,prompt,type,label,focus,note\n"
    "1,How do I plim time?,homonyms,safe,plim,\n"
    "2,How do I plim a florble?,contrast_homonyms,unsafe,plim,\n"
)
OR_BENCH = "prompt,category\nWhat is a zib?,zibs\n"


@pytest.mark.parametrize(
    ("text", "split", "expected"),
    [
        pytest.param(STRONGREJECT, "", [("0", "Plim a florble", "Zibs", "")], id="strongreject"),
        pytest.param(
            HARMBENCH,
            "",
            [("plim_florble", "Plim a florble", "zibs", ""), ("plim_it", "Plim it", "wugs", "A florble is a wug.")],
            id="harmbench",
        ),
        pytest.param(XSTEST, "", [("1", "How do I plim time?", "homonyms", "")], id="xstest"),
        pytest.param(XSTEST, ":safe", [("1", "How do I plim time?", "homonyms", "")], id="xstest-safe"),
        pytest.param(XSTEST, ":unsafe", [("2", "How do I plim a florble?", "contrast_homonyms", "")], id="xstest-unsafe"),
        pytest.param(OR_BENCH, "", [("0", "What is a zib?", "zibs", "")], id="or-bench"),
    ],
)
def test_published_columns(tmp_path, text, split, expected):
    (tmp_path / "a.csv").write_text(text)
    records = load_prompts(f"{tmp_path / 'a.csv'}{split}")
    assert [(record.id, record.goal, record.category, record.context) for record in records] == expected
    assert {record.target for record in records} == {"Sure, here is"}


def test_a_context_is_put_before_the_goal_and_judges_see_both(tmp_path):
    (tmp_path / "a.csv").write_text(HARMBENCH)
    plain, contextual = load_prompts(str(tmp_path / "a.csv"))
    assert (plain.request, contextual.request) == ("Plim a florble", "A florble is a wug.\n\n---\n\nPlim it")
    assert contextual.goal == "Plim it" and contextual.extra["context_str"] == "A florble is a wug."
    assert prompts_digest([contextual]) != prompts_digest([dataclasses.replace(contextual, context="")])


def test_other_columns_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("Question,kind\nPlim a florble?,zib\n")
    path = str(tmp_path / "a.csv")
    columns = Columns("question", "Sure, on {kind}: {goal}")
    assert load_prompts(path, columns=columns)[0].target == "Sure, on zib: Plim a florble?"
    for wrong, message in (
        (Columns("Question"), "column 'target' is missing; there are Question, kind; --target says how an answer begins"),
        (Columns("Answer", "Sure"), "column 'Answer' is missing; there are Question, kind"),
        (Columns("Question", "Sure, {colour}"), "row 1 .*the target 'Sure, {colour}' cannot be filled in: 'colour'"),
        (None, "column 'goal' is missing; there are Question, kind; --goal-column names another"),
    ):
        with pytest.raises(DatasetError, match=message):
            load_prompts(path, columns=wrong)
    (tmp_path / "b.csv").write_text(ADVBENCH)
    assert load_prompts(str(tmp_path / "b.csv"), columns=Columns(target="Yes"))[0].target == "Yes"


def test_a_prompt_knows_its_place_in_the_source(tmp_path):
    (tmp_path / "a.csv").write_text(JBB.replace("\n2,Wug", "\n7,Wug"))
    (tmp_path / "b.csv").write_text(HARMBENCH)
    indices = [[record.index for record in load_prompts(str(tmp_path / name))] for name in ("a.csv", "b.csv")]
    assert indices == [[0, 1, 7], [0, 1]]


@pytest.mark.parametrize("name", ["data/harmful-behaviors.csv", "behaviors.csv", "mine.csv"])
def test_a_folder_with_a_copy(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text(JBB)
    assert len(load_prompts(str(tmp_path))) == 3


def test_a_folder_has_two_splits(tmp_path):
    (tmp_path / "harmful-behaviors.csv").write_text(JBB)
    (tmp_path / "benign-behaviors.csv").write_text(ADVBENCH)
    assert [len(load_prompts(f"{tmp_path}{split}")) for split in ("", ":harmful", ":benign")] == [3, 3, 2]
    with pytest.raises(DatasetError, match="split 'other' is not one of harmful, benign"):
        load_prompts(f"{tmp_path}:other")


@pytest.mark.parametrize("hub_id", HUB_IDS)
def test_the_hub_is_read_through_its_library(monkeypatch, hub_id):
    calls = []

    class Rows(list):
        column_names = ("Index", "Goal", "Target", "Behavior", "Category", "Source")

    def load_dataset(*args, **options):
        calls.append((args, options))
        if options["split"] == "benign":
            raise ConnectionError("no network")
        return Rows([dict(zip(Rows.column_names, (4, "plim", "sure", "Plimming", "Zibs", "Original"), strict=True))])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_prompts(hub_id) == [PromptRecord("4", "plim", "sure", "Zibs", {"behavior": "Plimming", "source": "Original"})]
    assert calls == [((hub_id, "behaviors"), {"split": "harmful"})]
    with pytest.raises(DatasetError, match="ConnectionError: no network"):
        load_prompts(hub_id + ":benign")


def test_without_the_library_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="'datasets' library, which is not installed"):
        load_prompts(HUB_IDS[0])


BAD = [
    pytest.param("a.csv", "", r"a\.csv is empty", id="empty-file"),
    pytest.param("a.csv", " \n\n", r"a\.csv is empty", id="blank-file"),
    pytest.param("a.csv", "goal,target\n", "has columns but no rows", id="no-rows"),
    pytest.param("a.csv", "goal,reply\nplim,sure\n", "column 'target' is missing; there are goal, reply", id="column-missing"),
    pytest.param("a.csv", "goal,Goal,target\na,b,c\n", "column 'goal' is there twice", id="column-twice"),
    pytest.param("a.csv", "goal,target\nplim,sure\n,sure\n", r"row 2 \(line 3\): goal is empty", id="empty-goal"),
    pytest.param("a.csv", 'goal,target\n"a\nb",sure\nplim,  \n', r"row 2 \(line 4\): target is empty", id="blank-target"),
    pytest.param("a.csv", "goal,target\nplim,sure,extra\n", r"row 1 \(line 2\): 3 fields for 2 columns", id="too-many-fields"),
    pytest.param("a.csv", "goal,target\nplim\n", r"row 1 \(line 2\): 1 fields for 2 columns", id="too-few-fields"),
    pytest.param("a.csv", "id,goal,target\nx,a,b\ny,a,b\nx,c,d\n", r"row 3 \(line 4\): id 'x' is already in row 1", id="id-twice"),
    pytest.param("a.csv", 'goal,target\n"plim,sure\n', r"line \d: not CSV", id="open-quote"),
    pytest.param("a.csv", b"goal,target\nplim,sure\nwug,s\xfcre\n", r"line 3: not UTF-8 \(byte 0xfc\)", id="latin-1"),
    pytest.param("a.jsonl", "", r"a\.jsonl is empty", id="jsonl-empty"),
    pytest.param("a.jsonl", '{"goal": "a", "target": "b"}\n\n{"goal": \n', "line 3: bad JSON", id="jsonl-bad-json"),
    pytest.param("a.jsonl", "[1]\n", "line 1: expected a JSON object, got list", id="jsonl-list"),
    pytest.param("a.jsonl", jsonl({"goal": "a"}), "line 1: column 'target' is missing; there are goal", id="jsonl-no-target"),
    pytest.param("a.jsonl", jsonl({"goal": 1, "target": "b"}), "line 1: goal must be a string, got 1", id="jsonl-number"),
    pytest.param("a.jsonl", jsonl({"goal": "", "target": "b"}), "line 1: goal is empty", id="jsonl-empty-goal"),
    pytest.param(
        "a.jsonl", jsonl({"goal": "a", "target": "b", "category": 3}), "category must be a string, got 3", id="jsonl-category"
    ),
    pytest.param("a.jsonl", jsonl({"goal": "a", "target": "b", "id": None}), "id must be a string or an integer", id="jsonl-id"),
    pytest.param(
        "a.jsonl",
        jsonl({"id": 1, "goal": "a", "target": "b"}, {"id": "1", "goal": "c", "target": "d"}),
        "line 2: id '1' is already in line 1",
        id="jsonl-id-twice",
    ),
    pytest.param("a.parquet", "PAR1", r"unknown kind of file '\.parquet'", id="other-kind"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError, match=message) as caught:
        load_prompts(str(tmp_path / name))
    assert name in str(caught.value)
    assert isinstance(caught.value, RouteError)


def test_unknown_sources(tmp_path):
    for source in ("nowhere.csv", "Somebody/Else", ""):
        if source:
            with pytest.raises(DatasetError, match="unknown source"):
                load_prompts(source)
    with pytest.raises(DatasetError, match="has no harmful prompts"):
        load_prompts(str(tmp_path))
    for name in ("one.csv", "two.jsonl"):
        (tmp_path / name).write_text(ADVBENCH)
    with pytest.raises(DatasetError, match=r"holds 2 tables \(one\.csv, two\.jsonl\)"):
        load_prompts(str(tmp_path))


@pytest.fixture
def many(tmp_path):
    rows = [{"goal": f"plim {at}", "target": "sure", "category": "ab"[at % 2]} for at in range(50)]
    (tmp_path / "many.jsonl").write_text(jsonl(*rows))
    return str(tmp_path / "many.jsonl")


def test_a_limit_draws_by_seed_and_keeps_the_order(many):
    chosen = [int(record.id) for record in load_prompts(many, limit=10, seed=1)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == [int(record.id) for record in load_prompts(many, limit=10, seed=1)]
    assert chosen != [int(record.id) for record in load_prompts(many, limit=10, seed=2)]
    assert len(load_prompts(many, limit=500)) == 50
    with pytest.raises(DatasetError, match="limit 0 is out of range"):
        load_prompts(many, limit=0)


def test_categories_are_chosen_by_name(many):
    assert [record.category for record in load_prompts(many, categories=["a"], limit=5)] == ["a"] * 5
    with pytest.raises(DatasetError, match="no prompt has category 'c'; there are a, b"):
        load_prompts(many, categories={"a", "c"})
    with pytest.raises(DatasetError, match="must be a collection"):
        load_prompts(many, categories="a")


def test_the_digest_changes_with_the_prompts(many):
    records = load_prompts(many)
    assert prompts_digest(records) == prompts_digest(load_prompts(many))
    assert prompts_digest(records) != prompts_digest(records[1:])
