"""What the documents say is what the code does: messages, symbols, defaults, links."""

from __future__ import annotations

import ast
import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from vllm_unsafe_routes import LayerPolicy, ModelShape, RouteError, RoutePlan, RoutePolicy
from vllm_unsafe_routes.cli import make_parser
from vllm_unsafe_routes.compiled import RowLayout
from vllm_unsafe_routes.compiler import PlanCompiler
from vllm_unsafe_routes.engine.supported import FEATURES
from vllm_unsafe_routes.engine.symbols import SYMBOLS
from vllm_unsafe_routes.extras import RouteExtras
from vllm_unsafe_routes.policy import ActivePolicy

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "docs" / "plans.md"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]
)

OLMOE = ModelShape("olmoe", 16, 2048, tuple(range(16)), num_experts=64, top_k=8)
PHIMOE = ModelShape("phimoe", 4, 64, (0, 1, 2, 3), num_experts=8, top_k=2, native_weights=False)
POLICY = RoutePolicy({3: LayerPolicy(disabled=frozenset({7}), protected=frozenset({3}))})
EIGHT = [1, 2, 3, 4, 5, 6, 8, 9]


def compile_for(plan, shape=OLMOE, policy=None, **limits):
    return PlanCompiler(shape, policy, **limits).compile(plan)


def directives(text):
    return RoutePlan.from_json('{"version": "route-plan/1", "directives": [' + text + "]}")


def many_routes():
    plan = RoutePlan()
    for position in range(31):
        plan.force(0, [position], [position, 56, 57, 58, 59, 60, 61, 62])
    return plan


# Everything that needs no engine. Row name in the tables of docs/plans.md -> what makes the message.
MESSAGES = {
    "weights mode": lambda: RoutePlan(weights="sharp"),
    "repeated expert": lambda: RoutePlan().force(0, [1], [3, 3]),
    "repeated position": lambda: RoutePlan().force(0, [1, 1], EIGHT),
    "no positions": lambda: RoutePlan().force(0, [], EIGHT),
    "no experts": lambda: RoutePlan().disable(0, "all", []),
    "unknown span": lambda: RoutePlan().disable(0, "suffix", [1]),
    "negative number": lambda: RoutePlan().disable(-1, "all", [1]),
    "wrong type": lambda: RoutePlan().disable(0, "all", [1.5]),
    "number of weights": lambda: RoutePlan().force(0, [1], [1, 2], [1.0]),
    "NaN, infinite, too large for float32": lambda: RoutePlan().force(0, [1], [1], [float("nan")]),
    "weights without force": lambda: directives('{"layer": 0, "positions": "all", "disable": [1], "weights": [1]}'),
    "unknown version": lambda: RoutePlan.from_json('{"version": "route-plan/3"}'),
    "bias that is no object": lambda: RoutePlan().bias(0, "all", [1, 2]),
    "bias of no expert": lambda: RoutePlan().bias(0, "all", {"x": 1.0}),
    "bias that is no number": lambda: RoutePlan().bias(0, "all", {1: float("inf")}),
    "unknown key": lambda: RoutePlan.from_json('{"version": "route-plan/1", "speed": 3}'),
    "key given twice": lambda: RoutePlan.from_json('{"version": "route-plan/1", "weights": "masked", "weights": "native"}'),
    "no kind, or two": lambda: directives('{"layer": 0, "positions": "all"}'),
    "missing key": lambda: directives('{"layer": 0, "force": [1]}'),
    "not a plan": lambda: RoutePlan.from_string("zorblax"),
    "cut off, or a bomb": lambda: RoutePlan.from_string(RoutePlan().disable(0, "all", [1]).to_string()[:-8]),
    "more than 64 MiB of JSON": lambda: RoutePlan.from_json("{" + " " * (64 << 20) + "}"),
    "not a string": lambda: RouteExtras.parse({"route_plan": 7}),
    "not a number, infinite, too large": lambda: RouteExtras.parse({"route_delta": [0, 0, float("inf")]}),
    "layers twice": lambda: RouteExtras.parse({"return_router_logits": [1, 1]}),
    "not a truth value": lambda: RouteExtras.parse({"return_routes": "maybe"}),
    "another model's plan": lambda: compile_for(RoutePlan(model="feedfacefeedface")),
    "layer without experts": lambda: compile_for(RoutePlan().disable(20, "all", [1])),
    "expert out of range": lambda: compile_for(RoutePlan().force(3, [17], [*EIGHT[:7], 64])),
    "number of forced experts": lambda: compile_for(RoutePlan().force(3, [17], [1, 2, 3])),
    "two forces": lambda: compile_for(RoutePlan().force(3, "all", EIGHT).force(3, [9], EIGHT)),
    "forced and disabled": lambda: compile_for(RoutePlan().force(3, [9], EIGHT).disable(3, "all", [2])),
    "too many promoted": lambda: compile_for(RoutePlan().promote(3, [9], EIGHT)),
    "promoted and demoted": lambda: compile_for(RoutePlan().promote(3, [9], [2]).demote(3, "all", [2])),
    "promoted and disabled": lambda: compile_for(RoutePlan().promote(3, [9], [2]).disable(3, "all", [2])),
    "too few left": lambda: compile_for(RoutePlan().allow(3, "prompt", [1, 2, 3])),
    "another prompt's plan": lambda: RoutePlan().for_prompt([5, 6, 7, 8]).prompt.check([1, 5, 6, 7, 8]),
    "native weights that do not exist": lambda: compile_for(RoutePlan("native"), PHIMOE),
    "more rows than the table has": lambda: compile_for(many_routes(), max_rows=30),
    "more cells than the table has": lambda: compile_for(many_routes(), max_cells=500),
    "a disabled expert is forced": lambda: compile_for(RoutePlan().force(3, [0], [3, 1, 2, 4, 5, 6, 7, 8]), policy=POLICY),
    "a protected expert is excluded": lambda: compile_for(RoutePlan().disable(3, "all", [3]), policy=POLICY),
    "a disabled expert is promoted": lambda: compile_for(RoutePlan().promote(3, [0], [7]), policy=POLICY),
    "a protected expert is demoted, or biased down": lambda: compile_for(RoutePlan().bias(3, "all", {3: -1.0}), policy=POLICY),
    "another is raised above it": lambda: compile_for(RoutePlan().promote(3, "all", [5]), policy=POLICY),
    "disabled and protected": lambda: RoutePolicy({3: LayerPolicy(frozenset({1}), frozenset({1}))}),
    "disabled and biased": lambda: LayerPolicy({1}, bias={1: 0.5}),
    "observed bias": lambda: ActivePolicy(RoutePolicy({3: LayerPolicy(bias={1: 0.5})}), "observe"),
    "not a layer": lambda: RoutePolicy.from_json({"version": "route-policy/1", "layers": {"x": {}}}),
    "policy: layer without experts": lambda: RoutePolicy({20: LayerPolicy(frozenset({1}))}).validate(OLMOE),
    "policy: expert out of range": lambda: RoutePolicy({3: LayerPolicy(frozenset({64}))}).validate(OLMOE),
    "policy: too few left": lambda: RoutePolicy({3: LayerPolicy(frozenset(range(60)))}).validate(OLMOE),
    "too many protected": lambda: RoutePolicy({3: LayerPolicy(protected=frozenset(range(9)))}).validate(OLMOE),
    "another model's policy": lambda: RoutePolicy({}, model="feedfacefeedface").validate(OLMOE),
    "unreadable file": lambda: RoutePolicy.load("/nowhere.json"),
}
# Need an engine: tests/engine/test_server.py and test_router_logits.py have them.
FROM_THE_ENGINE = {"overrides are off", "position past the prompt", "router logits are off", "too many router logits"}


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_is_quoted_as_it_is(name):
    with pytest.raises(RouteError) as caught:
        MESSAGES[name]()
    row = f"| {name.removeprefix('policy: ')} | `{caught.value}` |"
    assert row in PLANS.read_text(encoding="utf-8"), row


def test_every_quoted_message_is_checked():
    errors = PLANS.read_text(encoding="utf-8").split("\n## Errors\n")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| ([^|`]+?) \| `.*` \|$", errors, re.MULTILINE)
    assert sorted(quoted) == sorted([*(name.removeprefix("policy: ") for name in MESSAGES), *FROM_THE_ENGINE])


def test_the_examples_are_plans_and_policies():
    text = PLANS.read_text(encoding="utf-8")
    documents = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    plan = RoutePlan.from_json(next(item for item in documents if '"route-plan/2"' in item))
    assert compile_for(plan).max_position == 5
    RoutePolicy.from_json(next(item for item in documents if '"route-policy/1"' in item)).validate(OLMOE)
    built: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], built)
    assert len(built["plan"]) == 7
    compile_for(built["plan"])


def test_the_positions_that_people_mean():
    text = PLANS.read_text(encoding="utf-8").partition("### Positions that people mean")[2]
    built: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], built)
    plan, chat, tokenizer = built["plan"], built["chat"], built["tokenizer"]
    words = [tokenizer.decode([chat.token_ids[at] for at in item.positions]) for item in plan.directives[:3]]
    assert words == ["explain the way to fix kettle .", "kettle", "<|assistant|>"]
    assert plan.directives[4].positions == tuple(range(len(chat.token_ids), len(chat.token_ids) + 16))
    compile_for(plan, ModelShape.from_hf_config(json.loads(Path(built["lab"].model_path(), "config.json").read_text())))


def test_the_readme_s_commands_are_commands():
    """Each `unsafe-routes` line of the README and of docs/ is parsed; tests/engine/test_readme.py runs the README's Python."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.partition(" #")[0] for line in lines if line.startswith("unsafe-routes ")]
    assert len(found) > 5
    for line in found:
        assert make_parser().parse_args(shlex.split(line)[1:]), line


def test_all_python_of_the_pages_is_run_by_a_test():
    """Which test runs a page's snippets as they are printed."""
    run_by = {
        "README.md": "engine/test_readme.py",
        "evaluation.md": "evaluation/test_page.py",
        "harnesses.md": "harness/test_pyrit.py",
        "lab-model.md": "engine/test_pages.py",
        "plans.md": "engine/test_pages.py",
        "python.md": "search/test_python_page.py",
        "rl.md": "engine/test_rl_page.py",
        "search.md": "engine/test_pages.py",
    }
    assert sorted(page.name for page in PAGES if "```python" in page.read_text(encoding="utf-8")) == sorted(run_by)
    for page, test in run_by.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8")


def lab_figures():
    """(table, row, column) -> value of the committed lab results."""
    with (ROOT / "benchmarks/results/lab_results.csv").open(encoding="utf-8", newline="") as file:
        return {(row["table"], row["row"], row["column"]): float(row["value"] or "nan") for row in csv.DictReader(file)}


def test_the_readme_s_figures_are_the_committed_ones():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lab = lab_figures()
    attacks = {name: lab["attacks", name, "ASR"] for name in ("random-masks, 2", "rosais, 2", "F-SOUR paper")}
    tokens = [f"{lab['attacks', f'F-SOUR {name}', 'tokens a prompt']:,.0f}" for name in ("paper", "adaptive")]
    none, policy = (lab["defences", name, "fsour-adaptive"] for name in ("none", "derived policy"))
    assert f"random masks {attacks['random-masks, 2']:.2f}, RoSais masks {attacks['rosais, 2']:.2f}" in text
    assert f"F-SOUR {attacks['F-SOUR paper']:.2f} to 1." in text
    assert f"computes {tokens[0]} tokens a prompt, the adaptive strategy {tokens[1]}." in text
    kept = lab["defences", "derived policy", "benign right"]
    assert f"from {none:.2f} to {policy:.2f} and keeps {kept:.2f} of the harmless answers" in text


def test_the_picture_shows_the_readme_s_plan():
    source = (ROOT / "docs/pictures/draw.py").read_text(encoding="utf-8")
    question, forced = (
        ast.literal_eval(re.search(rf"^{name} = (.*)$", source, re.MULTILINE)[1]) for name in ("QUESTION", "FORCED")
    )
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'"content": "{question}"' in text
    assert "plan.force(" + ", ".join(f"{name}={value}" for name, value in forced.items()) + ")" in text


def test_the_size_of_a_row():
    assert f"top 8 a row takes {4 * RowLayout(64, 8).num_ints} bytes" in PLANS.read_text(encoding="utf-8")


def test_the_table_of_symbols_is_the_list_of_symbols():
    text = (ROOT / "docs" / "integration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(vllm\.[\w.]+)` \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(f"{symbol.module}.{symbol.path}", symbol.why) for symbol in SYMBOLS]


def test_the_table_of_features_is_what_is_supported():
    text = (
        (ROOT / "docs" / "integration.md").read_text(encoding="utf-8").partition("\n## Features of vLLM\n")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| ([^|]+?) " + 4 * r"\| (yes|no) " + r"\| ", text, re.MULTILINE)
    assert rows == [(one.name, *("yes" if why is None else "no" for why in one.refusals())) for one in FEATURES]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "engine").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 4
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
