"""The run folder of a long campaign: what was asked, every result once, and the end.

    folder/
      settings.json   what the campaign computes; reopening with other settings is refused
      records.jsonl   one result a line, only ever appended to
      summary.json    written by `finish`, whole or not at all
      lock            held by the process that writes; names it

A campaign is killed, the disk fills, two people start it at once: no row may be lost, doubled or half written, and a resumed run
must end with the results of an uninterrupted one (`Campaign.results_digest`). A record is in the file as soon as `append` returns,
so it survives a kill of the process; it survives a power cut once it is synced, at most `sync_seconds` of appending later.

    with Campaign(folder, settings) as campaign, CleanStop() as stop, progress_bar(len(prompts), "prompts") as progress:
        for prompt in prompts:
            if stop:
                break
            if not campaign.done(prompt.id):
                campaign.append(prompt.id, {"score": score(prompt)})
            progress.update()
        else:
            campaign.finish(summarise(campaign.records()))

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import msgspec
import numpy as np

from ..errors import RouteError
from ..files import FULL, file_error, read_object, sync_folder, write_atomically

SETTINGS_FILE = "settings.json"
RECORDS_FILE = "records.jsonl"
SUMMARY_FILE = "summary.json"
LOCK_FILE = "lock"
KEY_FIELD = "key"
# Fields that differ between two runs with the same results.
VOLATILE_FIELDS = ("timestamp", "seconds")
# Records that say how a run went, not what it found.
VOLATILE_TYPES = ("work",)

Key = str | int | tuple[str | int | float | bool | None, ...]

logger = logging.getLogger(__name__)


class CampaignError(RouteError):
    """A run folder that cannot be opened or written; the message names the folder or file, and the line where there is one."""


def _plain(value: Any) -> Any:
    """`json.dumps(default=...)`: the few types beside JSON's own that results are made of."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _path_of_non_finite(value: Any, where: str = "") -> str | None:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return where or "value"
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return None
    for name, item in items:
        found = _path_of_non_finite(item, f"{where}.{name}" if where else str(name))
        if found is not None:
            return found
    return None


def _dumps(value: Any, what: str, indent: int | None = None) -> str:
    """Canonical JSON: keys sorted, no NaN. Raises `CampaignError` naming `what`."""
    separators = (",", ": ") if indent else (",", ":")
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, indent=indent, separators=separators, default=_plain)
    except (TypeError, ValueError) as error:
        field = _path_of_non_finite(value)
        if field is not None:
            raise CampaignError(f"{what}: {field} is not finite, which JSON cannot say; write None or a string") from None
        raise CampaignError(f"{what}: {error}") from None


def _canonical_key(key: Any) -> str:
    parts = key if isinstance(key, tuple | list) else (key,)
    if isinstance(key, bool) or key is None or isinstance(key, float):
        raise CampaignError(f"key must be a string, an integer or a tuple, got {key!r}")
    if not parts:
        raise CampaignError("key is empty")
    for part in parts:
        if part is not None and not isinstance(part, str | int | float | np.integer):
            raise CampaignError(f"key {key!r}: {part!r} is not a string, a number or None")
    return _dumps(key, f"key {key!r}")


def _failed(path: Path, doing: str, error: OSError) -> RouteError:
    return file_error(path, doing, error, CampaignError)


def _take_lock(folder: Path) -> int:
    """The descriptor that holds the lock of a folder until it is closed or the process ends, however it ends."""
    path = folder / LOCK_FILE
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 1000, 0).decode("utf-8", "replace").strip()
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise _failed(path, "this filesystem grants no lock, so two writers could not be kept apart", error) from error
        raise CampaignError(
            f"{folder} is being written by {holder or 'another process'}; wait for it, stop it, or take another folder"
        ) from None
    # Only for people who meet the lock.
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        if error.errno not in FULL:
            os.close(lock)
            raise
    return lock


def _check_settings(folder: Path, settings: Mapping[str, Any], later: Mapping[str, Any], resume: bool) -> None:
    """Write the settings of a new folder; refuse those of an old one that differ."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        for name in (RECORDS_FILE, SUMMARY_FILE):
            if (folder / name).exists():
                raise CampaignError(f"{folder} has {name} but no {SETTINGS_FILE}: what it holds is unknown")
        write_atomically(path, _dumps(settings, "settings", indent=2) + "\n", CampaignError)
        return
    if not resume:
        raise CampaignError(f"{folder} already holds a campaign; resume it or take another folder")
    lines = _differences({**later, **_leaves(read_settings(folder))}, {**later, **_leaves(settings)})
    if lines:
        raise CampaignError(f"{folder} was made with other settings: {'; '.join(lines)}")


def _leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}; an empty mapping is a leaf."""
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for name, item in value.items():
            found.update(_leaves(item, f"{where}.{name}" if where else str(name)))
        return found
    return {where: value}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines about leaves that are not the same."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = (json.dumps(leaves[name], sort_keys=True) if name in leaves else "(absent)" for leaves in (old, new))
        if before != after:
            lines.append(f"{name}: was {before}, now {after}")
    return lines


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the campaign in `folder`; needs no lock."""
    path = Path(folder) / SETTINGS_FILE
    if not path.exists():
        raise CampaignError(f"{folder} is not a campaign's folder: it has no {SETTINGS_FILE}")
    return read_object(path, "settings", CampaignError)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
        if not isinstance(record, dict) or KEY_FIELD not in record:
            raise ValueError(f"a record is a JSON object with {KEY_FIELD!r}, got {line[:60]!r}")
    except ValueError as error:
        raise CampaignError(
            f"{path}, line {number}: not a record: {error}. This is no torn last line, so nothing was changed; "
            "repair or delete the line to go on (a deleted record is computed again)"
        ) from None
    if isinstance(record[KEY_FIELD], list):
        record[KEY_FIELD] = tuple(record[KEY_FIELD])
    return record


def read_lines(folder: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of the whole records in `folder`, in the order in which they were written.

    Needs no lock and changes nothing. A last line that is still being written is left out.
    """
    path = Path(folder) / RECORDS_FILE
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield f"{path}, line {number}", _parse(line, path, number)


def read_records(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The whole records in `folder` as `read_lines`, each as JSON values with its key (a string, an integer or a tuple)."""
    return (record for _, record in read_lines(folder))


def _keys_of(path: Path) -> tuple[set[str], int]:
    """The keys of the whole records in a file, and the bytes that these records take."""
    line_of_key: dict[str, int] = {}
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            key = _canonical_key(_parse(line, path, number)[KEY_FIELD])
            if key in line_of_key:
                raise CampaignError(f"{path}, line {number}: key {key} is already on line {line_of_key[key]}")
            line_of_key[key] = number
            whole += len(line)
    return set(line_of_key), whole


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(item, names) for name, item in value.items() if name not in names}
    if isinstance(value, list | tuple):
        return [_without(item, names) for item in value]
    return value


class Campaign:
    """One writer's hold on a run folder.

    Args:
        folder: made if it is not there.
        settings: everything that decides the results, as JSON values; compared with what the folder was made with.
        later: settings that folders may be older than, nested names with dots: what one that does not name them was made with.
        resume: False: a folder that already holds a campaign is refused.
        sync_seconds: how much appending a power cut may cost; 0 syncs every record.
        volatile: names of record fields, at any depth, that `results_digest` ignores.

    Raises:
        CampaignError: other settings (names each differing key with both values), another writer (names its process), a
            damaged record that is not the last line, a key that is there twice.

    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        resume: bool = True,
        *,
        later: Mapping[str, Any] = MappingProxyType({}),
        sync_seconds: float = 1.0,
        volatile: Iterable[str] = VOLATILE_FIELDS,
    ) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(_dumps(dict(settings), "settings"))
        self.volatile = frozenset(volatile)
        # Bytes of a torn last line that opening cut off.
        self.truncated_bytes = 0
        self._sync_seconds = sync_seconds
        self._mutex = threading.RLock()
        self._keys: set[str] = set()
        self._records = self._lock = -1
        self._broken: str | None = None
        self._unsynced = False
        self._last_sync = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CampaignError(f"{self.folder} cannot be made: {error.strerror}") from error
        try:
            self._lock = _take_lock(self.folder)
            _check_settings(self.folder, self.settings, later, resume)
            self._open_records()
        except OSError as error:
            self._release()
            raise _failed(self.folder, "the run folder cannot be opened", error) from error
        except BaseException:
            self._release()
            raise
        _open_campaigns.add(self)

    def _open_records(self) -> None:
        path = self.folder / RECORDS_FILE
        is_new = not path.exists()
        self._records = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if is_new:
            sync_folder(self.folder)
        self._keys, whole = _keys_of(path)
        size = os.fstat(self._records).st_size
        if size > whole:
            # A line counts once its newline is written, so this record was never reported as done.
            self.truncated_bytes = size - whole
            logger.warning("%s: cut off a torn last line of %d bytes", path, self.truncated_bytes)
            os.ftruncate(self._records, whole)
            os.fsync(self._records)

    # Writing.

    def done(self, key: Key) -> bool:
        """Whether there is a record with this key."""
        return _canonical_key(key) in self._keys

    __contains__ = done

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, key: Key, record: Mapping[str, Any] | msgspec.Struct) -> None:
        """Write one record. When this returns it is in the file; when it raises, the file is as it was before.

        Safe to call from several threads.

        Args:
            key: what the record is the result of; a tuple and a list of the same parts are the same key.
            record: JSON values, numpy scalars and arrays, or a struct of them; `"key"` is taken.

        Raises:
            CampaignError: a key that is there already, a value that is not JSON (NaN and infinities are not), a full disk.

        """
        name = _canonical_key(key)
        fields = msgspec.to_builtins(record, str_keys=True) if isinstance(record, msgspec.Struct) else record
        if KEY_FIELD in fields:
            raise CampaignError(f"record {name}: the field {KEY_FIELD!r} is taken")
        line = (_dumps({KEY_FIELD: key, **fields}, f"record {name}") + "\n").encode()
        path = self.folder / RECORDS_FILE
        with self._mutex:
            self._check_open()
            if name in self._keys:
                raise CampaignError(f"{path}: there is already a record with key {name}")
            status = os.fstat(self._records)
            if status.st_nlink == 0:
                raise CampaignError(f"{path} was removed while the campaign was writing it")
            try:
                self._keys.add(name)
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._records, rest) :]
            except BaseException as error:
                # Also on KeyboardInterrupt: half a line must not stay.
                self._keys.discard(name)
                self._cut_back(status.st_size)
                if isinstance(error, OSError):
                    raise file_error(
                        path, f"record {name} was not written, the {len(self)} before it are whole", error, CampaignError
                    ) from error
                raise
            self._unsynced = True
            if time.monotonic() - self._last_sync >= self._sync_seconds:
                self.flush()

    def _cut_back(self, size: int) -> None:
        try:
            os.ftruncate(self._records, size)
        except OSError as error:
            # The next opening cuts the torn line off; until then another append would be glued to it.
            self._broken = f"a torn line could not be cut off ({error.strerror})"

    def flush(self) -> None:
        """Sync what was appended to the disk."""
        with self._mutex:
            self._check_open()
            if not self._unsynced:
                return
            try:
                os.fsync(self._records)
            except OSError as error:
                # The kernel may have dropped the pages: what is on disk is only known after reading it again.
                self._broken = f"syncing failed ({error.strerror})"
                raise file_error(
                    self.folder / RECORDS_FILE, "not synced; reopen the campaign to see what it holds", error, CampaignError
                ) from error
            self._unsynced = False
            self._last_sync = time.monotonic()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Sync the records, then write `summary.json`, whole or not at all. May be called again."""
        text = _dumps(dict(summary), "summary", indent=2) + "\n"
        with self._mutex:
            self.flush()
            write_atomically(self.folder / SUMMARY_FILE, text, CampaignError)

    @property
    def finished(self) -> bool:
        """Whether the folder has a summary."""
        return (self.folder / SUMMARY_FILE).exists()

    def _check_open(self) -> None:
        if self._records < 0:
            raise CampaignError(f"{self.folder} is closed in this process")
        if self._broken is not None:
            raise CampaignError(f"{self.folder}: {self._broken}; open the campaign again")

    def close(self) -> None:
        """Sync and let go of the folder. Calling it again does nothing."""
        with self._mutex:
            try:
                if self._records >= 0 and self._broken is None:
                    self.flush()
            finally:
                self._release()

    def _release(self) -> None:
        for descriptor in (self._records, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._records = self._lock = -1

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Reading.

    def records(self) -> Iterator[dict[str, Any]]:
        """The records so far, as `read_records`."""
        return read_records(self.folder)

    def results_digest(self) -> str:
        """32 hex digits over the records without their volatile fields, whatever the order in which they were written."""
        return results_digest(self.folder, self.volatile)


def results_digest(folder: str | os.PathLike[str], volatile: Iterable[str] = VOLATILE_FIELDS) -> str:
    """`Campaign.results_digest` of a folder; needs no lock."""
    names = frozenset(volatile)
    found = (record for record in read_records(folder) if record.get("type") not in VOLATILE_TYPES)
    lines = sorted(hashlib.sha256(_dumps(_without(record, names), "record").encode()).digest() for record in found)
    return hashlib.sha256(b"".join(lines)).hexdigest()[:32]


_open_campaigns: weakref.WeakSet[Campaign] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked child shares the open lock. Were it to outlive its parent (an engine's worker process), the lock would too.
    for campaign in list(_open_campaigns):
        campaign._release()


os.register_at_fork(after_in_child=_let_go_in_child)
