"""What becomes of each MoE architecture that vLLM registers under route control: a table that ships with the package.

`make cuda-binding` makes it: vLLM's CUDA platform on a faked H100, tiny configs, weights on the meta device. Nothing is computed
there: "bound" says that every MoE layer was taken control of, not that logits were compared. docs/models.md names what was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
# vLLM release -> architecture -> row: verdict, why, model_type, router, experts, moe_layers.
Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
_ABSENT = "not registered"


@cache
def load() -> Table:
    """The shipped table."""
    table: Table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def verdict(row: Mapping[str, Any] | None) -> str:
    """A row's end in words: bound, refused or not built, and why."""
    if row is None:
        return _ABSENT
    return f"{row['verdict']}: {row['why']}" if "why" in row else str(row["verdict"])


def names(table: Table) -> list[str]:
    """All architectures, sorted."""
    return sorted({name for rows in table.values() for name in rows})


def facts(architectures: Iterable[str]) -> dict[str, dict[str, str]]:
    """Architecture -> release -> verdict, for what a model's config names."""
    table = load()
    return {name: {release: verdict(rows.get(name)) for release, rows in table.items()} for name in architectures}


def text(table: Table) -> str:
    """The table for a terminal: an architecture, then a line a release."""
    lines = []
    for name in names(table):
        ends = {release: verdict(rows.get(name)) for release, rows in table.items()}
        same = len(set(ends.values())) == 1
        lines.append(f"{name}  {_makes(table, name)}".rstrip())
        lines += [f"  {release:<8} {end}" for release, end in ({", ".join(ends): ends[min(ends)]} if same else ends).items()]
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """The table for docs/models.md."""
    head = ["architecture", "router, expert kernels", *table]
    lines = [head, ["---"] * len(head)]
    for name in names(table):
        lines.append([f"`{name}`", _makes(table, name) or "–", *(verdict(rows.get(name)) for rows in table.values())])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _makes(table: Table, name: str) -> str:
    """Router and expert kernels in the newest release that has them."""
    for rows in reversed(list(table.values())):
        row = rows.get(name, {})
        if row.get("router"):
            return f"{row['router']}, {row['experts']}"
    return ""
