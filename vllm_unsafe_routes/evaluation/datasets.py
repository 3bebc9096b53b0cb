"""Prompts to measure with, read from files that the user has or from JailbreakBench's data set on the Hugging Face hub.

Known forms, by their published columns (`FORMS`):

- JailbreakBench behaviours (Chao et al., arXiv 2404.01318): Index, Goal, Target, Behavior, Category, Source.
- AdvBench (Zou et al., arXiv 2307.15043): goal, target. JSON lines with goal, target and, if wanted, category and id.
- StrongREJECT (Souly et al., arXiv 2402.10260): category, source, forbidden_prompt.
- HarmBench (Mazeika et al., arXiv 2402.04249): Behavior, SemanticCategory, ContextString, BehaviorID; a context is put before what
  is asked, as published.
- Harmless: XSTest (Roettger et al., arXiv 2308.01263): id, prompt, type, label; its unsafe contrasts are another split,
  `FILE:unsafe`. OR-Bench (Cui et al., arXiv 2405.20947): prompt, category.

Column names are matched whatever their case. What is wrong is named by file, row and column; nothing is skipped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RouteError

HUB_ID = "JailbreakBench/JBB-Behaviors"
# The second is where the first stood before, and what the paper's artifacts name.
HUB_IDS = (HUB_ID, "dedeswim/JBB-Behaviors")
SPLITS = ("harmful", "benign")
# Where a downloaded copy of the hub's repository, or of JailbreakBench's own, keeps a split.
_FOLDER_FILES = {
    "harmful": ("data/harmful-behaviors.csv", "harmful-behaviors.csv", "data/behaviors.csv", "behaviors.csv"),
    "benign": ("data/benign-behaviors.csv", "benign-behaviors.csv"),
}
# How an answer that complies begins, where a data set does not say.
DEFAULT_TARGET = "Sure, here is"
_CONTEXT_SEPARATOR = "\n\n---\n\n"
_LABELS = ("safe", "unsafe")


@dataclass(frozen=True, slots=True)
class Form:
    """Columns of a data set, in lower case.

    Attributes:
        goal: what is asked.
        needs: columns that tell the form from others.
        id: of the prompt.
        category: of the prompt.
        has_target: whether there must be a column `target`.

    """

    goal: str
    needs: tuple[str, ...] = ()
    id: tuple[str, ...] = ("id", "index")
    category: str = "category"
    has_target: bool = False


FORMS = (
    Form("goal", has_target=True),
    Form("forbidden_prompt"),
    Form("behavior", ("behaviorid",), ("behaviorid",), "semanticcategory"),
    Form("prompt", ("type",), category="type"),
    Form("prompt", ("category",)),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Where goal and target are, for files of no known form.

    Attributes:
        goal: name of the column, whatever its case; None: as the known forms have it.
        target: how an answer that complies begins, for every prompt: a text with {goal} or {other column} in it; None: the column
            `target`.

    """

    goal: str | None = None
    target: str | None = None


class DatasetError(RouteError):
    """Prompts that cannot be read; the message names the file, the row and the column."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt.

    Attributes:
        id: unique within its source: the source's own index, or the 0-based row number.
        goal: what is asked of the model, and what judges see.
        target: how an answer that complies begins.
        category: "" where the source has none.
        extra: the source's other fields under lower-case names, such as `behavior` and `source`.
        context: text that is put before the goal in what the model gets.
        row: 0-based row of the source.

    """

    id: str
    goal: str
    target: str
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    context: str = ""
    row: int = field(default=0, compare=False)

    @property
    def request(self) -> str:
        """What the model gets."""
        return f"{self.context}{_CONTEXT_SEPARATOR}{self.goal}" if self.context else self.goal

    @property
    def index(self) -> int:
        """The source's own index where its ids are numbers, else the row."""
        return int(self.id) if self.id.isdecimal() else self.row


def load_prompts(
    source: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    categories: Collection[str] | None = None,
    columns: Columns | None = None,
) -> list[PromptRecord]:
    """Read prompts.

    Args:
        source: a `.csv` or `.jsonl` file, a folder with a copy of JailbreakBench's data set, or that data set's hub id
            (needs the `datasets` library). The last two take a split: `...:benign`; without it, `harmful`. A file with a column
            `label` of safe and unsafe (XSTest) likewise: `...:unsafe`; without it, `safe`.
        limit: how many to draw, with `seed` and without replacement; the file's order is kept. More than there are: all.
        seed: of the draw.
        categories: keep these only; each must be there.
        columns: for files of no known form.

    Raises:
        DatasetError: an unknown source, an unreadable or empty file, a missing column, an empty goal or target, an id that is
            there twice, an unknown category.

    """
    if limit is not None and limit < 1:
        raise DatasetError(f"limit {limit} is out of range (1 or more)")
    if isinstance(categories, str):
        raise DatasetError(f"categories must be a collection of names, got the string {categories!r}")
    records = _load(source, columns or Columns())
    if categories is not None:
        known = sorted({record.category for record in records})
        unknown = sorted(set(categories) - set(known))
        if unknown:
            raise DatasetError(f"{source}: no prompt has category {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        records = [record for record in records if record.category in categories]
    if limit is not None and limit < len(records):
        chosen = sorted(random.Random(seed).sample(range(len(records)), limit))
        records = [records[at] for at in chosen]
    return records


def prompts_digest(records: Iterable[PromptRecord]) -> str:
    """32 hex digits over ids, goals, targets and categories, for the settings of a campaign."""
    rows = [
        [record.id, record.goal, record.target, record.category, *([record.context] if record.context else [])]
        for record in records
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def _load(source: str, columns: Columns) -> list[PromptRecord]:
    path, split, label = Path(source), "harmful", "safe"
    if not path.exists():
        name, colon, suffix = source.rpartition(":")
        if colon and Path(name).is_file() and suffix in _LABELS:
            return _labelled(_read_file(Path(name), columns), suffix, name)
        if colon and (name in HUB_IDS or Path(name).is_dir()):
            if suffix not in SPLITS:
                raise DatasetError(f"{source}: split {suffix!r} is not one of {', '.join(SPLITS)}")
            path, split = Path(name), suffix
            source = name
    if path.is_dir():
        path = _file_in(path, split)
    if path.exists():
        records = _read_file(path, columns)
        return _labelled(records, label, str(path)) if all("label" in record.extra for record in records) else records
    if source in HUB_IDS:
        return _from_hub(source, split, columns)
    raise DatasetError(f"unknown source {source!r}: neither a file, nor a folder, nor {' or '.join(HUB_IDS)}")


def _labelled(records: list[PromptRecord], label: str, where: str) -> list[PromptRecord]:
    """The prompts that their data set calls safe, or those that it calls unsafe."""
    labels = {record.extra.get("label") for record in records}
    if not labels <= set(_LABELS):
        # The column means something else.
        if label == "safe":
            return records
        raise DatasetError(f"{where}: there is no column 'label' with safe and unsafe")
    return [record for record in records if record.extra["label"] == label]


def _file_in(folder: Path, split: str) -> Path:
    for name in _FOLDER_FILES[split]:
        if (folder / name).is_file():
            return folder / name
    if split == "harmful":
        found = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".jsonl"))
        if len(found) == 1:
            return found[0]
        if found:
            raise DatasetError(f"{folder} holds {len(found)} tables ({', '.join(path.name for path in found)}); name one")
    raise DatasetError(f"{folder} has no {split} prompts: expected {' or '.join(_FOLDER_FILES[split])}")


def _from_hub(name: str, split: str, columns: Columns) -> list[PromptRecord]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DatasetError(
            f"{name} is read through the 'datasets' library, which is not installed; install it, or give the path of a copy"
        ) from None
    try:
        rows = load_dataset(name, "behaviors", split=split)
    except Exception as error:
        # The library raises whatever its network and cache layers do.
        raise DatasetError(f"{name} ({split}) cannot be loaded: {type(error).__name__}: {error}") from error
    names = list(rows.column_names)
    return _records(((at, "", [row[column] for column in names]) for at, row in enumerate(rows)), names, f"{name}:{split}", columns)


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#04x})") from None
    if not text.strip():
        raise DatasetError(f"{path} is empty")
    return text


def _read_file(path: Path, columns: Columns) -> list[PromptRecord]:
    if path.suffix == ".csv":
        return _read_csv(path, columns)
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, columns)
    raise DatasetError(f"{path}: unknown kind of file {path.suffix!r}; known are .csv and .jsonl")


def _read_csv(path: Path, columns: Columns) -> list[PromptRecord]:
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True)

    def rows() -> Iterator[tuple[int, str, Sequence[Any]]]:
        number = 0
        for values in reader:
            if values:
                yield number, f" (line {reader.line_num})", values
                number += 1

    try:
        names = next(reader)
        return _records(rows(), names, str(path), columns)
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _read_jsonl(path: Path, columns: Columns) -> list[PromptRecord]:
    records = []
    seen: dict[str, int] = {}
    number = 0
    # Not splitlines: JSON strings may hold U+2028 and its like.
    for line_number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {line_number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{where}: bad JSON: {error}") from None
        if not isinstance(row, dict):
            raise DatasetError(f"{where}: expected a JSON object, got {type(row).__name__}")
        form = _form(list(map(str, row)), where, columns)
        records.append(_record(row, number, where, form, columns))
        _check_id(records[-1].id, line_number, seen, where, "line")
        number += 1
    return records


def _form(names: Sequence[str], where: str, columns: Columns) -> Form:
    """Which columns hold what. Raises `DatasetError` for those of no known form."""
    lower = {name.strip().lower() for name in names}
    there = f"there are {', '.join(names) or 'none'}"
    if columns.goal is not None:
        if columns.goal.lower() not in lower:
            raise DatasetError(f"{where}: column {columns.goal!r} is missing; {there}")
        form = Form(columns.goal.lower(), has_target=True)
    else:
        form = next((one for one in FORMS if lower.issuperset((one.goal, *one.needs))), FORMS[0])
    if form.goal not in lower:
        raise DatasetError(f"{where}: column {form.goal!r} is missing; {there}; --goal-column names another")
    if form.has_target and columns.target is None and "target" not in lower:
        raise DatasetError(f"{where}: column 'target' is missing; {there}; --target says how an answer begins")
    return form


def _records(
    rows: Iterable[tuple[int, str, Sequence[Any]]], names: Sequence[str], where: str, columns: Columns
) -> list[PromptRecord]:
    lower = [name.strip().lower() for name in names]
    for name in lower:
        if lower.count(name) > 1:
            raise DatasetError(f"{where}: column {name!r} is there twice")
    form = _form(names, where, columns)
    records: list[PromptRecord] = []
    seen: dict[str, int] = {}
    for number, place, values in rows:
        here = f"{where}, row {number + 1}{place}"
        if len(values) != len(names):
            raise DatasetError(f"{here}: {len(values)} fields for {len(names)} columns")
        records.append(_record(dict(zip(lower, values, strict=True)), number, here, form, columns))
        _check_id(records[-1].id, number + 1, seen, here, "row")
    if not records:
        raise DatasetError(f"{where} has columns but no rows")
    return records


def _record(row: Mapping[str, Any], number: int, where: str, form: Form, columns: Columns) -> PromptRecord:
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    target = _filled(columns.target, fields, form, where) if columns.target is not None else fields.pop("target", DEFAULT_TARGET)
    goal = fields.pop(form.goal)
    for name, value in ((form.goal, goal), ("target", target)):
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {name} must be a string, got {value!r}")
        if not value.strip():
            raise DatasetError(f"{where}: {name} is empty")
    category = fields.pop(form.category, None)
    if category is not None and not isinstance(category, str):
        raise DatasetError(f"{where}: category must be a string, got {category!r}")
    own_id = next((fields.pop(name) for name in form.id if name in fields), number)
    if isinstance(own_id, bool) or not isinstance(own_id, str | int) or own_id == "":
        raise DatasetError(f"{where}: id must be a string or an integer, got {own_id!r}")
    record = PromptRecord(str(own_id), goal, target, category or "", fields, row=number)
    context = fields.get("contextstring")
    if isinstance(context, str) and context.strip():
        # Under the name that HarmBench's judge for such prompts fills in.
        record = replace(record, context=context, extra={**fields, "context_str": context})
    return record


def _filled(template: str, fields: Mapping[str, Any], form: Form, where: str) -> str:
    known = {**fields, "goal": fields[form.goal]}
    try:
        return template.format_map(known)
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(f"{where}: the target {template!r} cannot be filled in: {error}; there are {', '.join(known)}") from None


def _check_id(own_id: str, number: int, seen: dict[str, int], where: str, unit: str) -> None:
    if own_id in seen:
        raise DatasetError(f"{where}: id {own_id!r} is already in {unit} {seen[own_id]}")
    seen[own_id] = number
