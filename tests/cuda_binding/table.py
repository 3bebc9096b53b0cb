"""Put the rows of both releases together: write the shipped table and docs/models.md, or fail where they differ.

    python tests/cuda_binding/table.py [--check] 0.32.0=ROWS 0.33.0=ROWS

ROWS is what `architectures.py` printed under that release.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from vllm_unsafe_routes import architectures

MODELS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- architectures:begin -->", "<!-- architectures:end -->"


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Architecture -> row. Of an error only what is the same on every run and machine."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "why" in row:
            why = row["why"].split("; serve the model without")[0]
            row["why"] = re.sub(r" \[type=.*| For further information.*", "", re.sub(r"/tmp/\w+", "MODEL", why)).strip()
        rows[row.pop("architecture")] = row
    return rows


def verified() -> set[str]:
    """Model types that docs/models.md calls verified."""
    section = MODELS.read_text(encoding="utf-8").split("\n## Verified\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def main(arguments: list[str]) -> None:
    """Write or compare."""
    check = "--check" in arguments
    given = dict(item.split("=", 1) for item in arguments if item != "--check")
    table = {release: rows_of(Path(path)) for release, path in given.items()}
    for release, rows in table.items():
        bound = {row["model_type"] for row in rows.values() if row["verdict"] == "bound"}
        if missing := verified() - bound:
            sys.exit(f"vLLM {release}: docs/models.md calls {sorted(missing)} verified, but no architecture of theirs is bound")
    page = MODELS.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    new_page = f"{before}{BEGIN}\n{architectures.markdown(table)}\n{END}{after}"
    if check:
        for release, rows in table.items():
            shipped = architectures.load()[release]
            differ = [name for name in sorted({*rows, *shipped}) if rows.get(name) != shipped.get(name)]
            for name in differ:
                print(f"vLLM {release}, {name}: shipped {shipped.get(name)}, now {rows.get(name)}")
            if differ:
                sys.exit(1)
        if new_page != page:
            sys.exit("docs/models.md does not hold the shipped table")
        return
    architectures.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    MODELS.write_text(new_page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
