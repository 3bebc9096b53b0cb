"""The shipped table of architectures: docs, `inspect` and the file say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_unsafe_routes import architectures
from vllm_unsafe_routes.cli import main

MODELS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TABLE = architectures.load()


def test_the_page_holds_the_shipped_table():
    page = MODELS.read_text(encoding="utf-8")
    between = page.split("<!-- architectures:begin -->\n")[1].split("\n<!-- architectures:end -->")[0]
    assert between == architectures.markdown(TABLE)


def test_every_row_has_a_verdict_and_a_reason_where_it_needs_one():
    assert list(TABLE) == ["0.32.0", "0.33.0"]
    for rows in TABLE.values():
        assert len(rows) > 90
        for name, row in rows.items():
            assert row["verdict"] in ("bound", "refused", "not built"), name
            assert ("why" in row) == (row["verdict"] != "bound"), name
            if row["verdict"] == "bound":
                assert row["moe_layers"] > 0, name
                assert row["router"], name


@pytest.mark.parametrize("model", ["OlmoeForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM", "Glm4MoeForCausalLM"])
def test_verified_families_are_bound_in_both_releases(model):
    assert architectures.facts([model]) == {model: {"0.32.0": "bound", "0.33.0": "bound"}}


def test_inspect_prints_a_model_s_rows(tmp_path, capsys):
    config = {
        "model_type": "longcat_flash",
        "architectures": ["LongcatFlashForCausalLM", "NobodysForCausalLM"],
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "moe_topk": 2,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["architectures"]
    assert "ZeroExpertRouter is not a router class known here" in facts["LongcatFlashForCausalLM"]["0.33.0"]
    assert facts["NobodysForCausalLM"] == {"0.32.0": "not registered", "0.33.0": "not registered"}
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "LongcatFlashForCausalLM, vLLM 0.32.0 refused: " in out


def test_inspect_prints_the_whole_table(capsys):
    assert main(["inspect", "--architectures"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip("\n") == architectures.text(TABLE)
    assert all(f"{name}  " in out or f"{name}\n" in out for name in architectures.names(TABLE))
    assert main(["inspect", "--architectures", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TABLE


def test_inspect_knows_the_lab_model(capsys):
    assert main(["inspect", "lab", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model_type"] == "olmoe"
    assert facts["architectures"]["OlmoeForCausalLM"]["0.33.0"] == "bound"
