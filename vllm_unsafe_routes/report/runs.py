"""Campaign folders as a report reads them: without the lock, so also while they are being written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RouteError
from ..study.campaign import RECORDS_FILE, SETTINGS_FILE, SUMMARY_FILE, read_settings
from ..study.records import (
    Answer,
    AttemptNote,
    Controls,
    DatasetMask,
    Entry,
    Fsour,
    Mask,
    Matrix,
    Recipe,
    Record,
    Rosais,
    Step,
    Throughput,
    Utility,
    Work,
    current,
    job_of,
    name_of_type,
)

# Types that a report shows; others are counted and named.
SHOWN = (Rosais, Answer, Mask, DatasetMask, AttemptNote, Fsour, Recipe, Controls, Matrix, Utility, Throughput, Work)
NO_CATEGORY = "no category"
_JUDGED = (Answer, Mask, DatasetMask, AttemptNote, Fsour, Recipe, Matrix, Utility)
R = TypeVar("R", bound=Record)


def category_of(record: Answer | Rosais | Mask | Fsour | Matrix) -> str:
    """The category of a record's prompt."""
    return record.category or NO_CATEGORY


@dataclass(frozen=True, slots=True)
class Run:
    """One campaign folder.

    Attributes:
        name: the folder's name, made distinct within a report.
        settings: as the campaign wrote them.
        entries: what a report shows, in the order of writing.
        finished: whether the campaign wrote its summary.
        started: UTC, to the minute, ISO 8601.
        last_record: likewise.
        unknown: type -> number of records that no part of a report knows.

    """

    name: str
    settings: Mapping[str, Any]
    entries: Sequence[Entry]
    finished: bool
    started: str
    last_record: str
    unknown: Mapping[str, int] = field(default_factory=dict)

    def records(self, kind: type[R]) -> list[R]:
        """The records of one type."""
        return [entry.record for entry in self.entries if isinstance(entry.record, kind)]

    @property
    def seeds(self) -> list[int]:
        """The seeds that were asked for."""
        return list(self.settings.get("seeds", []))

    @property
    def policy(self) -> str | None:
        """Digest of the policy that held in this run."""
        policy = self.settings.get("policy")
        return None if policy is None else str(policy)

    @property
    def judged(self) -> bool:
        """Whether a judge was asked anything."""
        return any(isinstance(entry.record, _JUDGED) for entry in self.entries)

    def by_job(self, kind: type[R]) -> list[tuple[tuple[Hashable, ...], R]]:
        """(key of the search that it belongs to, record) of one type."""
        return [(job_of(entry), entry.record) for entry in self.entries if isinstance(entry.record, kind)]

    def progress(self) -> tuple[int, int | None]:
        """How many results there are, and how many there will be where the settings say so."""
        done = sum(not isinstance(entry.record, AttemptNote | Work | Controls) for entry in self.entries)
        prompts, seeds = self.settings.get("num_prompts"), len(self.seeds)
        if not isinstance(prompts, int) or not seeds:
            return done, None
        command = self.settings.get("command")
        if command in ("rosais", "fsour"):
            return done, prompts * (seeds + bool(self.settings.get("plain_answer_first")))
        if command == "recipe":
            return done, prompts * (1 + seeds * len(self.settings.get("recipes", ())))
        if command == "mask-attack" and not self.records(DatasetMask):
            return done, prompts * (1 + seeds * len(self.settings.get("attacks", ())))
        return done, None


def _minute(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%MZ")


def load_run(folder: str | os.PathLike[str], name: str) -> Run:
    """Read one folder.

    Raises:
        RouteError: no campaign there, no result yet, or a record that is damaged.

    """
    path = Path(folder)
    if not path.is_dir():
        raise RouteError(f"run {path}: there is no such folder")
    settings = read_settings(path)
    if "fingerprint" not in settings:
        raise RouteError(f"run {path}: {SETTINGS_FILE} names no model fingerprint, so it is no run of this toolkit")
    shown: list[Entry] = []
    unknown: Counter[str] = Counter()
    for entry in current(path):
        if isinstance(entry.record, SHOWN):
            shown.append(entry)
        # Where an unfinished attempt stands is of use to the search that goes on from it only.
        elif not isinstance(entry.record, Step):
            unknown[name_of_type(entry.record)] += 1
    if all(isinstance(entry.record, Work) for entry in shown):
        if unknown:
            raise RouteError(f"run {path} holds nothing that a report shows, only records of type {', '.join(sorted(unknown))}")
        raise RouteError(f"run {path} has no results yet; wait for its first prompt")
    return Run(
        name=name,
        settings=settings,
        entries=shown,
        finished=(path / SUMMARY_FILE).exists(),
        started=_minute(path / SETTINGS_FILE),
        last_record=_minute(path / RECORDS_FILE),
        unknown=dict(unknown),
    )


def load_runs(folders: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read several folders of one model.

    Raises:
        RouteError: as `load_run`; also a folder named twice, and runs of different models.

    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise RouteError("a report needs at least one run folder")
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise RouteError(f"run {path} is named twice")
        seen[path.resolve()] = path
    runs = [load_run(path, name) for path, name in zip(paths, _names(list(seen)), strict=True)]
    first = runs[0].settings
    for path, run in zip(paths, runs, strict=True):
        for key, what in (("fingerprint", "shape fingerprint"), ("model_identity", "model identity")):
            if run.settings.get(key) != first.get(key):
                raise RouteError(
                    f"runs of different models: {paths[0]} has {what} {first.get(key)}, {path} has {run.settings.get(key)}; "
                    "write one report for each model"
                )
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them all apart."""
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1
