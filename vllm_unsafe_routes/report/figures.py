"""The report's figures: PNG, at most 1200 pixels wide, colours that colour-blind readers can tell apart (Okabe and Ito; cividis).

Every figure is drawn from the report's numbers alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RouteError

THIN_SPACE = "\u202f"
DPI = 150
WIDTH = 8.0  # inches; times DPI: 1200 pixels
INK, MUTED, GRID, NOTHING = "#1b1f24", "#57606a", "#d8dee4", "#eef1f4"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"),
    "#8c959f",
)
COLORS = {
    "none": GREY,
    "random-masks": GREY,
    "random-layers": SKY,
    "rosais": BLUE,
    "rosais-dataset": PURPLE,
    "fsour-paper": ORANGE,
    "fsour-code": GREEN,
    "fsour-adaptive": VERMILION,
}
CYCLE = (VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY, GREY)
MOST_ROW_LABELS = 48
MOST_CELL_LABELS = 200
MOST_COLUMN_LABELS = 12

STYLE: dict[Any, Any] = {
    # Names of runs and prompts may hold a dollar sign.
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One image.

    Attributes:
        name: file name without its ending.
        section: part of the page that it belongs to.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        png: the image.

    """

    name: str
    section: str
    alt: str
    caption: str
    png: bytes


def draw(report: Mapping[str, Any]) -> list[Figure]:
    """All figures that the numbers give.

    Raises:
        RouteError: matplotlib is not installed.

    """
    try:
        import matplotlib

        # A report must not need a display, nor change how the caller's process draws.
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401
    except ImportError:
        raise RouteError("figures need matplotlib: pip install 'vllm-unsafe-routes[report]'") from None
    figures: list[Figure] = []
    with matplotlib.rc_context(STYLE):
        for painter in (_rosais_bars, _rosais_maps, _asr, _matrix, _curves, _routes):
            figures += painter(report)
    return figures


def _canvas(height: float, rows: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(rows, 1, squeeze=False, **options)
    return drawing, list(axes[:, 0])


def _png(drawing: Any) -> bytes:
    buffer = io.BytesIO()
    # No software version inside: equal numbers give equal files.
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _gaps(interval: Mapping[str, Any]) -> tuple[float, float]:
    return max(interval["value"] - interval["low"], 0.0), max(interval["high"] - interval["value"], 0.0)


def _whiskers(axis: Any, at: Any, intervals: Sequence[Mapping[str, Any]], horizontal: bool = False) -> None:
    gaps = np.array([_gaps(interval) for interval in intervals]).T
    values = [interval["value"] for interval in intervals]
    style: dict[str, Any] = dict(fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5, capthick=1.1)
    if horizontal:
        axis.errorbar(values, at, xerr=gaps, **style)
    else:
        axis.errorbar(at, values, yerr=gaps, **style)


def _label_layers(axis: Any, layers: Sequence[int]) -> None:
    step = max(1, -(-len(layers) // 32))
    axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


class _Sets:
    """Which prompts the entries of a figure are about: said in it where they are not the same."""

    def __init__(self, report: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> None:
        shown = {entry["run"] for entry in entries}
        sets = [one for one in report["prompt_sets"] if shown & set(one["runs"])]
        self._of_run = {run: one["name"] for one in sets for run in one["runs"]} if len(sets) > 1 else {}
        names = [f"{one['name']}: {one['prompts']} of {one['data']}" for one in sets]
        self.note = f" Different prompts, not to be compared with each other: {'; '.join(names)}." if self._of_run else ""

    def label(self, entry: Mapping[str, Any], limit: int) -> str:
        """An entry's label, with the name of its prompts."""
        name = self._of_run.get(entry["run"])
        return _short(entry["label"], limit) if name is None else f"{_short(entry['label'], limit - 4)} [{name}]"

    def write(self, drawing: Any) -> None:
        """The note as the figure's last line."""
        if self.note:
            drawing.supxlabel(_short(self.note.strip(), 150), fontsize=7.5, color=MUTED, x=0.01, ha="left")


def _rosais_bars(report: Mapping[str, Any]) -> Iterable[Figure]:
    entries = report["rosais"]
    if not entries:
        return
    sets = _Sets(report, entries)
    drawing, axes = _canvas(0.5 + 2.3 * len(entries), len(entries), sharey=True)
    for axis, entry in zip(axes, entries, strict=True):
        layers = [one["layer"] for one in entry["layers"]]
        at = np.arange(len(layers))
        width = min(0.7, 0.12 + 0.06 * len(layers))
        axis.bar(at, [one["value"] for one in entry["layers"]], width=width, color=BLUE)
        _whiskers(axis, at, entry["layers"])
        # Beside the whisker, which would be hidden behind it.
        dataset = [
            (place + 0.3 * width, one["dataset"])
            for place, one in zip(at, entry["layers"], strict=True)
            if one["dataset"] is not None
        ]
        if dataset:
            axis.scatter(
                *zip(*dataset, strict=True), marker="D", s=26, color="white", edgecolors=VERMILION, linewidths=1.4, zorder=4
            )
            axis.scatter([], [], marker="D", s=26, color="white", edgecolors=VERMILION, linewidths=1.4, label="dataset level")
            axis.legend(loc="upper right")
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.grid(axis="y")
        axis.set_title(f"{sets.label(entry, 80)} · {entry['num_prompts']} prompts, {_count(entry['seeds'], 'seed')}")
        axis.set_ylabel("RoSais (nats)")
        axis.set_xlim(-0.7, len(layers) - 0.3)
        _label_layers(axis, layers)
    axes[-1].set_xlabel("decoder layer")
    sets.write(drawing)
    drawn = any(one["dataset"] is not None for entry in entries for one in entry["layers"])
    diamonds = " The dataset-level score (diamond) is the best gain of one mask averaged over all prompts." if drawn else ""
    yield Figure(
        "rosais_by_layer",
        "rosais",
        "Bars: mean RoSais of each layer with its interval.",
        f"Mean RoSais of each layer; whiskers: 95% interval over prompts and seeds.{diamonds}{sets.note}",
        _png(drawing),
    )


def _count(items: Sequence[Any], unit: str) -> str:
    return f"{len(items)} {unit}{'' if len(items) == 1 else 's'}"


def _rosais_maps(report: Mapping[str, Any]) -> Iterable[Figure]:
    # One scale, so that variants can be compared by colour.
    everything = [score for entry in report["rosais"] for one in entry["prompts"] for score in one["scores"]]
    low, high = min(everything, default=0.0), max(everything, default=0.0)
    for number, entry in enumerate(report["rosais"], start=1):
        table = np.array([one["scores"] for one in entry["prompts"]], dtype=float)
        layers = [one["layer"] for one in entry["layers"]]
        names = [one["category"] for one in entry["prompts"]]
        drawing, (axis,) = _canvas(min(1.3 + 0.19 * len(table), 11.0))
        if low < 0:
            colours: dict[str, Any] = dict(cmap="PuOr_r", vmin=-max(high, -low), vmax=max(high, -low))
        else:
            colours = dict(cmap="cividis", vmin=0.0, vmax=high or 1.0)
        image = axis.imshow(table, aspect="auto", interpolation="nearest", **colours)
        _no_frame(axis)
        if table.size <= MOST_CELL_LABELS and table.shape[1] <= MOST_COLUMN_LABELS:
            for (row, column), score in np.ndenumerate(table):
                axis.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=7, color=_ink(image, score))
        if len(table) <= MOST_ROW_LABELS:
            axis.set_yticks(range(len(table)), [_short(str(one["prompt"]), 26) for one in entry["prompts"]], fontsize=7)
        else:
            axis.set_yticks([])
        _label_layers(axis, layers)
        starts = [at for at, name in enumerate(names) if at == 0 or names[at - 1] != name]
        for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
            if start:
                axis.axhline(start - 0.5, color="white", linewidth=2.2)
            axis.annotate(
                _short(names[start], 28),
                (1.0, (start + end - 1) / 2),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_xlabel("decoder layer")
        axis.set_ylabel("prompt")
        axis.set_title(entry["label"])
        drawing.colorbar(image, ax=axis, label="RoSais (nats)", fraction=0.04, pad=0.02).outline.set_visible(False)
        yield Figure(
            f"rosais_by_prompt_{number}",
            "rosais",
            "Heat map: RoSais of each layer for each prompt, prompts grouped by category.",
            "RoSais of every layer for every prompt, mean over seeds; prompts are grouped by category (named at the right).",
            _png(drawing),
        )


def _ink(image: Any, value: float) -> str:
    """Black or white, whichever can be read on the colour that `value` has in the image."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _no_frame(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _asr(report: Mapping[str, Any]) -> Iterable[Figure]:
    entries = report["asr"]
    if not entries:
        return
    sets = _Sets(report, entries)
    drawing, (axis,) = _canvas(0.8 + 0.34 * len(entries))
    at = np.arange(len(entries))
    known = [(place, entry) for place, entry in zip(at, entries, strict=True) if entry["value"] is not None]
    axis.barh(
        [place for place, _ in known],
        [entry["value"] for _, entry in known],
        height=0.62,
        color=[COLORS.get(entry["attack"], GREY) for _, entry in known],
    )
    if known:
        _whiskers(axis, [place for place, _ in known], [entry for _, entry in known], horizontal=True)
        # A bar of length 0 must be seen to be there.
        axis.plot([entry["value"] for _, entry in known], [place for place, _ in known], "o", color=INK, ms=3.5, clip_on=False)
    for place, entry in zip(at, entries, strict=True):
        if entry["value"] is None:
            axis.text(0.01, place, f"no verdict ({_times(entry['errors'], 'judge error')})", va="center", fontsize=8, color=MUTED)
            continue
        errors = f"  ·  {_times(entry['errors'], 'error')}" if entry["errors"] else ""
        axis.annotate(
            f"{entry['value']:.2f}  [{entry['low']:.2f}, {entry['high']:.2f}]{errors}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
    axis.set_yticks(at, [sets.label(entry, 46) for entry in entries])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.set_xlim(0, 1.005)
    axis.set_xlabel("attack success rate (share of answers judged harmful)")
    axis.grid(axis="x")
    sets.write(drawing)
    yield Figure(
        "attack_success_rate",
        "asr",
        "Horizontal bars: attack success rate of every attack with its interval.",
        "Attack success rate; whiskers and brackets: 95% interval over prompts and seeds. L is the number of masked layers. "
        "Answers without a verdict are left out of the rate and counted at the right." + sets.note,
        _png(drawing),
    )


def _times(count: int, unit: str) -> str:
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _matrix(report: Mapping[str, Any]) -> Iterable[Figure]:
    for number, entry in enumerate(report["matrix"], start=1):
        table = np.array(
            [[np.nan if cell is None or cell["value"] is None else cell["value"] for cell in row] for row in entry["cells"]]
        )
        drawing, (axis,) = _canvas(1.2 + 0.46 * len(table))
        image = axis.imshow(np.ma.masked_invalid(table), aspect="auto", cmap="cividis", vmin=0, vmax=1)
        _no_frame(axis)
        axis.set_yticks(range(len(table)), [_short(label, 34) for label in entry["attack_labels"]])
        columns = entry["defence_labels"]
        axis.set_xticks(range(len(columns)), [_short(label, 22) for label in columns], rotation=0 if len(columns) < 6 else 25)
        axis.xaxis.tick_top()
        axis.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(table) - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=2)
        axis.tick_params(which="minor", length=0)
        for row, cells in enumerate(entry["cells"]):
            for column, cell in enumerate(cells):
                if cell is None:
                    axis.text(column, row, "–", ha="center", va="center", color=MUTED)
                elif cell["value"] is None:
                    axis.text(column, row, "no verdict", ha="center", va="center", fontsize=7.5, color=MUTED)
                else:
                    text = f"{cell['value']:.2f}\n[{cell['low']:.2f}, {cell['high']:.2f}]"
                    axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=_ink(image, cell["value"]))
        drawing.colorbar(image, ax=axis, label="ASR", fraction=0.04, pad=0.02).outline.set_visible(False)
        yield Figure(
            f"attack_defence_{number}",
            "matrix",
            "Table of attack success rates, attacks by defences.",
            "Attack success rate of each attack (rows) under each defence (columns), with 95% intervals. Lower is safer.",
            _png(drawing),
        )


def _curves(report: Mapping[str, Any]) -> Iterable[Figure]:
    entries = report["curves"]
    if not entries:
        return
    sets = _Sets(report, entries)
    drawing, (axis,) = _canvas(3.7)
    colours = _distinct(entries, lambda entry: entry["attack"])
    end = max(point[0] for entry in entries for line in entry["lines"] for point in line["points"])
    for entry, colour in zip(entries, colours, strict=True):
        alpha = min(0.35, max(0.06, 6 / len(entry["lines"])))
        for line in entry["lines"]:
            axis.step(*zip(*line["points"], strict=True), where="post", color=colour, alpha=alpha, linewidth=0.8)
    for entry, colour in zip(entries, colours, strict=True):
        tokens, values = zip(*entry["median"], strict=True)
        axis.step(tokens, values, where="post", color="white", linewidth=4.0)
        axis.step(tokens, values, where="post", color=colour, linewidth=2.2, label=f"{sets.label(entry, 60)} (median)")
        axis.hlines(values[-1], tokens[-1], end, color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
    for log_tau in sorted({entry["log_tau"] for entry in entries if entry["log_tau"] is not None}):
        axis.axhline(log_tau, color=INK, linewidth=1.0, linestyle=(0, (5, 3)))
        axis.annotate(
            f"log τ = {log_tau:.2f}".replace("-", "−"),
            (0.0, log_tau),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}".replace(",", THIN_SPACE))
    axis.set_ylim(top=max(0.15, axis.get_ylim()[1]))
    axis.set_xlabel("tokens computed for one prompt and seed (log scale)")
    axis.set_ylabel("best log-probability of the target (nats)")
    axis.grid(axis="y")
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(len(entries), 3), borderaxespad=0.3)
    sets.write(drawing)
    yield Figure(
        "log_probability_by_tokens",
        "curves",
        "Lines: best log-probability of the target so far against tokens computed.",
        "Thin: one prompt and seed, the best over all its attempts so far. Bold: median over them; a search that is over keeps its "
        "last value. Tokens are those that the engine computed; prefix-cache hits are not among them." + sets.note,
        _png(drawing),
    )


def _distinct(entries: Sequence[Any], attack_of: Callable[[Any], str]) -> list[str]:
    """The attack's own colour; from the cycle where two entries would share one."""
    wanted = [COLORS.get(attack_of(entry), GREY) for entry in entries]
    return wanted if len(set(wanted)) == len(wanted) else [CYCLE[at % len(CYCLE)] for at in range(len(entries))]


def _routes(report: Mapping[str, Any]) -> Iterable[Figure]:
    entries = [entry for entry in report["routes"] if entry["accepted"]]
    if not entries:
        return
    sets = _Sets(report, entries)
    # One scale of positions for all panels, so that the prompt's end stands at the same place.
    longest = max(len(entry["positions"]) for entry in entries)
    heights = [min(max(0.9, 0.14 * len(entry["layers"])), 3.2) for entry in entries for _ in ("counts", "gains")]
    drawing, axes = _canvas(sum(heights) + 0.75 * len(heights) + 0.3, len(heights), height_ratios=heights)
    for number, entry in enumerate(entries):
        label, searches = sets.label(entry, 60), entry["searches"]
        title = f"{label} · {entry['accepted']} routes of {searches} search{'' if searches == 1 else 'es'}"
        _positions(drawing, axes[2 * number], entry, np.array(entry["counts"]), longest, (title, "count"))
        _positions(drawing, axes[2 * number + 1], entry, np.array(entry["gains"]), longest, (f"{label} · what they gained", "nats"))
    axes[-1].set_xlabel("prompt position, counted from the prompt's end (−1 is its last token)")
    sets.write(drawing)
    yield Figure(
        "accepted_routes",
        "routes",
        "Heat maps: accepted routes, and the nats that they gained, by layer and by position from the prompt's end.",
        "Routes that each search accepted in the attempt that counts, by layer and position, and below what they gained together "
        "when they were accepted; grey: none. Early positions exist in the longer prompts only; a search that goes from the first "
        "position on may reach τ before it comes to the last ones; and the model's last layer is searched at the prompt's last "
        "token only, because elsewhere no choice there reaches the answer." + sets.note,
        _png(drawing),
    )


def _positions(drawing: Any, axis: Any, entry: Mapping[str, Any], values: Any, longest: int, titles: tuple[str, str]) -> None:
    """A heat map of layers by positions; `titles` are the panel's and the colour bar's."""
    title, unit = titles
    layers = entry["layers"]
    extent = (entry["positions"][0] - 0.5, -0.5, len(layers) - 0.5, -0.5)
    axis.set_facecolor(NOTHING)
    image = axis.imshow(
        np.ma.masked_equal(values, 0), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest", extent=extent
    )
    _no_frame(axis)
    axis.set_xlim(-longest - 0.5, -0.5)
    axis.invert_yaxis()
    step = max(1, -(-len(layers) // 8))
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.set_ylabel("layer")
    whole = np.issubdtype(values.dtype, np.integer)
    if values.size <= MOST_CELL_LABELS:
        for (row, column), value in np.ndenumerate(values):
            ink = _ink(image, value) if value else MUTED
            text = str(value) if whole or not value else f"{value:.1f}"
            axis.text(entry["positions"][column], row, text if value else "0", ha="center", va="center", fontsize=7, color=ink)
    axis.set_title(title)
    bar = drawing.colorbar(image, ax=axis, label=unit, fraction=0.04, pad=0.015)
    bar.outline.set_visible(False)
    if whole:
        bar.locator = _integers()
        bar.update_ticks()


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)
