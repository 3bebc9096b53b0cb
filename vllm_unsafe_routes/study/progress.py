"""How far a campaign is, and how it is asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class CleanStop:
    """While this context is open, the first Ctrl-C or SIGTERM asks for a stop between records; the second aborts.

    It is true once a stop was asked for. Outside the main thread, where Python handles no signals, it stays false.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, message: str = "stopping after the work in hand; once more to abort") -> None:
        self.requested = False
        self._message = message
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.requested

    def __enter__(self) -> CleanStop:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through sys.stderr: the signal may have come in the middle of a write to it.
        os.write(2, f"\n{self._message}\n".encode())


class _Lines(tqdm):  # type: ignore[misc]
    """A bar as whole lines, for a log."""

    monitor_interval = 0

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes a state: a line of its own, none for an empty one."""

        def write(state: str) -> None:
            if state:
                file.write(f"{state}\n")
                file.flush()

        return write


def progress_bar(
    total: int, unit: str, *, initial: int = 0, label: str = "", every_seconds: float = 30.0, stream: TextIO | None = None
) -> tqdm[Any]:
    """How far a campaign is, on stderr: a bar on a terminal, elsewhere a line every `every_seconds`; call its `update`.

    Args:
        total: how many units there are.
        unit: their name, in the plural.
        initial: how many an earlier run has done; they do not count as throughput.
        label: what is running.
        every_seconds: between two lines; work that is over earlier prints none.
        stream: None: stderr.

    """
    stream = sys.stderr if stream is None else stream
    settings: dict[str, Any] = dict(
        total=total, initial=initial, unit=f" {unit}", desc=label and f"{label}: ", file=stream, smoothing=0, dynamic_ncols=True
    )
    if stream.isatty():
        return tqdm(**settings)
    bar = "{desc}{n_fmt}/{total_fmt}{unit} ({percentage:.0f}%), {rate_noinv_fmt}, {remaining} left"
    return _Lines(**settings, bar_format=bar, mininterval=every_seconds, delay=every_seconds, miniters=1)
