"""The pictures of the README: `make pictures`.

    python docs/pictures/draw.py attacks     # attacks.svg, from benchmarks/results/lab_results.csv
    python docs/pictures/draw.py route       # route.svg: one prompt in the engine, with and without the README's plan

The language of the lab model is made up, so both answers can be shown.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

if TYPE_CHECKING:
    from vllm_unsafe_routes.search.backend import Response

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks/results/lab_results.csv"
QUESTION = "explain the way to pack rusty jurgrim ."
FORCED = {"layer": 0, "positions": [10], "experts": [1, 11, 13, 15]}
# Okabe and Ito's colours, which colour-blind readers tell apart.
GREY, BLUE, SKY, ORANGE, INK, PALE = "#8a939c", "#0072b2", "#56b4e9", "#d55e00", "#1b1f24", "#f1f3f5"
TINT = "#fbdcc4"
# Row of the table of attacks -> name, colour.
ATTACKS = {
    "no attack": ("no attack", GREY),
    "random-masks, 2": ("a random mask on 2 random layers", GREY),
    "random-layers, 2": ("best masks on 2 random layers", SKY),
    "rosais, 2": ("best masks on the 2 top RoSais layers", BLUE),
    "F-SOUR paper": ("F-SOUR, as published", ORANGE),
    "F-SOUR adaptive": ("F-SOUR, adaptive (ours)", ORANGE),
}


def save(figure: Any, name: str) -> None:
    """Write an SVG that is the same for the same data."""
    figure.savefig(HERE / name, metadata={"Date": None}, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    print(HERE / name)


def draw_attacks() -> None:
    """Attack success with its interval, one bar an attack."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        found = {row["row"]: row for row in csv.DictReader(file) if row["table"] == "attacks" and row["column"] == "ASR"}
    figure, axes = plt.subplots(figsize=(8.6, 2.7))
    for at, (row, (name, colour)) in enumerate(ATTACKS.items()):
        value, low, high = (float(found[row][key]) for key in ("value", "low", "high"))
        axes.barh(at, value, color=colour, height=0.62)
        axes.plot([low, high], [at, at], color=INK, linewidth=1.3, marker="|", markersize=7)
        axes.text(1.03, at, f"{value:.2f}  [{low:.2f}, {high:.2f}]", va="center", fontsize=9.5, color=INK)
        axes.text(-0.02, at, name, va="center", ha="right", fontsize=10, color=INK)
    axes.set(xlim=(0, 1), ylim=(len(ATTACKS) - 0.5, -0.5), yticks=[], xticks=np.linspace(0, 1, 6))
    axes.set_xlabel("share of refused prompts that are answered, 95% interval", fontsize=9.5, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    save(figure, "attacks.svg")


def run_lab() -> tuple[list[str], Response, Response, list[str]]:
    """Tokens of the question, the engine's responses without and with the plan, and both answers."""
    from vllm_unsafe_routes import RoutePlan
    from vllm_unsafe_routes.extras import RouteExtras
    from vllm_unsafe_routes.search.backend import Request, Search, run_search
    from vllm_unsafe_routes.study.bench import open_backend
    from vllm_unsafe_routes.study.model import LAB, Model
    from vllm_unsafe_routes.study.settings import EngineSettings

    model = Model(LAB)
    token_ids = model.encode_chat(QUESTION)
    plan = RoutePlan().force(**FORCED)

    def both() -> Search[list[Response]]:
        extras = [RouteExtras(text, wants_routes=True) for text in (None, plan.to_string())]
        return (yield [Request(token_ids, one, 32, model.stop_token_ids) for one in extras])

    with open_backend(model, EngineSettings(dtype="float32")) as backend:
        before, after = run_search(backend, both())
    tokens = [model.tokenizer.decode([token]) for token in token_ids]
    return tokens, before, after, [model.decode(one.token_ids) for one in (before, after)]


def draw_cell(axes: Any, column: int, row: int, experts: list[int], kind: str) -> None:
    """One token at one layer with the experts that it goes to."""
    fill, ink = {"forced": (ORANGE, "white"), "changed": (TINT, INK), "same": (PALE, "#6b747d")}[kind]
    axes.add_patch(
        FancyBboxPatch((column - 0.47, row - 0.4), 0.94, 0.8, boxstyle="round,pad=0,rounding_size=0.09", color=fill, linewidth=0)
    )
    weight = "bold" if kind == "forced" else "normal"
    axes.text(column, row, " ".join(map(str, experts)), ha="center", va="center", fontsize=6.9, color=ink, fontweight=weight)


def draw_route() -> None:
    """Tokens x layers: the one cell that the plan forces, the cells that change with it, and both answers."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tokens, before, after, answers = run_lab()
    assert before.route_ids is not None
    assert after.route_ids is not None
    old, new = (np.sort(one.route_ids[: len(tokens)], axis=-1) for one in (before, after))
    num_layers = old.shape[1]
    figure, axes = plt.subplots(figsize=(11.2, 3.3))
    for column, token in enumerate(tokens):
        special = token.startswith("<")
        axes.text(
            column, -0.75, token.strip("<|>") if special else token, ha="center", fontsize=8.5, color=GREY if special else INK
        )
        for layer in range(num_layers):
            forced = layer == FORCED["layer"] and column in FORCED["positions"]
            kind = "forced" if forced else "same" if (old[column, layer] == new[column, layer]).all() else "changed"
            draw_cell(axes, column, layer, new[column, layer].tolist(), kind)
    for layer in range(num_layers):
        axes.text(-0.65, layer, f"layer {layer}", ha="right", va="center", fontsize=9, color=INK)
    lines = [("without a plan", answers[0], GREY), ("one cell forced", answers[1], ORANGE)]
    for at, (label, answer, colour) in enumerate(lines):
        y = num_layers + 0.15 + 0.7 * at
        axes.text(-0.65, y, label, ha="right", va="center", fontsize=9.5, color=colour, fontweight="bold")
        axes.text(-0.4, y, answer, ha="left", va="center", fontsize=11, color=INK, family="monospace")
    axes.set(xlim=(-2.2, len(tokens) - 0.5), ylim=(num_layers + 1.3, -1.15))
    axes.axis("off")
    save(figure, "route.svg")


if __name__ == "__main__":
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vllm-unsafe-routes"
    for picture in sys.argv[1:] or ["attacks", "route"]:
        {"attacks": draw_attacks, "route": draw_route}[picture]()
