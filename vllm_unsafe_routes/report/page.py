"""The HTML page: one file without scripts and without anything to load, readable in light and dark and on paper.

The words and their order are in `page.html.jinja`, the looks in `page.css`; the page carries both. Everything that comes from
records or settings goes through Jinja2's autoescape.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ..errors import RouteError
from .figures import Figure

# Columns of a table by category; a model with more layers shows its most critical ones.
MOST_LAYER_COLUMNS = 10


def render(report: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The page.

    Raises:
        RouteError: Jinja2 is not installed.

    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise RouteError("the page needs Jinja2: pip install 'vllm-unsafe-routes[report]'") from None
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "rate": _rate,
        "interval": _interval,
        "number": _number,
        "percent": _percent,
        "setting": _setting,
        "uri": _uri,
        "minute": _minute,
        "signed": _signed,
        "plural": _plural,
    }
    sections: dict[str, list[Figure]] = {}
    for figure in figures:
        sections.setdefault(figure.section, []).append(figure)
    return environment.get_template("page.html.jinja").render(
        report=report,
        figures=sections,
        facts=_facts(report),
        shown_layers=[entry["ranking"][:MOST_LAYER_COLUMNS] for entry in report["rosais"]],
        style=resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8"),
    )


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for the report as a whole."""
    runs = report["runs"]
    return {
        "prompts": sorted({run["prompts"] for run in runs if run["prompts"] is not None}),
        "seeds": sorted({seed for run in runs for seed in run["seeds"]}),
        "policies": sorted({run["policy"] for run in runs if run["policy"]}),
        "judges": sorted({name for run in runs for name in _judges(run)}),
        "devices": sorted({run["device"] for run in runs if run["device"]}),
        "versions": sorted({f"{name} {number}" for run in runs for name, number in run["versions"].items()}),
        "first": min(run["started"] for run in runs),
        "last": max(run["last_record"] for run in runs),
        "unfinished": [run["name"] for run in runs if not run["finished"]],
        "attack_errors": sum(entry["errors"] for entry in report["asr"]),
        "errors": sum(entry["errors"] for entry in report["asr"])
        + sum(cell["errors"] for table in report["matrix"] for row in table["cells"] for cell in row if cell),
    }


def _judges(run: Mapping[str, Any]) -> list[str]:
    """Names, and what tells judges of one name apart; none for a run that judged nothing."""
    named = []
    for one in run["judges"]:
        facts = [f"content {one['identity'][:8]}"]
        facts += [] if one.get("threshold") is None else [f"harmful from {one['threshold']:g}"]
        facts += ["ends searches"] if one["role"] == "stop" else []
        named.append(f"{one['name']} ({', '.join(facts)})")
    return named or ([run["judge"]] if run["judge"] else [])


def _rate(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return "no verdict" if entry["value"] is None else f"{entry['value']:.2f}"


def _interval(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None or entry["value"] is None else f"[{entry['low']:.2f}, {entry['high']:.2f}]"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    # Thin spaces between thousands, understood everywhere.
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.1f}"
    return text.replace(",", "\u202f")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _minute(stamp: str) -> str:
    return stamp.rstrip("Z").replace("T", " ")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212")


def _uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.png).decode("ascii")


def _plural(count: int, unit: str) -> str:
    ending = "es" if unit.endswith(("ch", "s")) else "s"
    return f"{count} {unit}{'' if count == 1 else ending}"
