"""A report's folder: `report.html`, `report.json` and one PNG for each figure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..files import write_atomically
from .figures import draw
from .page import render

PAGE_FILE, NUMBERS_FILE = "report.html", "report.json"


def write_report(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write what `collect` found into `folder`, which is made if it is not there; returns the page's path.

    Raises:
        RouteError: the folder or a file cannot be written; matplotlib or Jinja2 is not installed.

    """
    out = Path(folder)
    figures = draw(report)
    page = render(report, figures)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            (out / f"{figure.name}.png").write_bytes(figure.png)
    except OSError as error:
        raise RouteError(f"report folder {out} cannot be written: {error.strerror}") from None
    write_atomically(out / NUMBERS_FILE, json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_atomically(out / PAGE_FILE, page)
    return out / PAGE_FILE
