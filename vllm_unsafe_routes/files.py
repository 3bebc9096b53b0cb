"""Files that are there whole or not at all, and errors that say when a disk is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import RouteError

T = TypeVar("T")

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would pass the process's or the filesystem's limit on file size",
}


def file_error(path: Path, doing: str, error: OSError, kind: type[RouteError] = RouteError) -> RouteError:
    """An error of class `kind` that names the path and what was being done."""
    reason = FULL.get(error.errno or 0)
    detail = f"{reason} ({error.strerror})" if reason else (error.strerror or str(error))
    return kind(f"{path}: {doing}: {detail}")


def read_file(path: str | os.PathLike[str], what: str, read: Callable[[str], T], kind: type[RouteError] = RouteError) -> T:
    """What `read` makes of a file's text.

    Raises:
        RouteError: of class `kind`; there is no such file, it is not UTF-8, or `read` refuses it. Says `what` it is and its path.

    """
    try:
        return read(Path(path).read_text(encoding="utf-8"))
    except RouteError as error:
        raise kind(f"{what} {path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_object(path: Path, what: str, kind: type[RouteError] = RouteError) -> dict[str, Any]:
    """The JSON object in a file. Raises an error of class `kind`, which says `what` the file is, where there is none."""
    document = read_file(path, what, json.loads, kind)
    if not isinstance(document, dict):
        raise kind(f"{what} {path} is not a JSON object")
    return document


def sync_folder(folder: Path) -> None:
    """Let a new entry of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str, kind: type[RouteError] = RouteError) -> None:
    """Replace `path` by a file with this text: afterwards it is there whole, or as it was before.

    Args:
        path: the file.
        text: what it holds afterwards.
        kind: class of the error.

    Raises:
        RouteError: the text could not be written; names the path and says when the disk is full.

    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise file_error(path, "not written", error, kind) from error
