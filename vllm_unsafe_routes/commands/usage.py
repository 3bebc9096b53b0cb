"""How `--help` looks: short usage, short names for values, and examples that can be pasted."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable
from typing import Any

_EXAMPLE = "Example: "


class Help(argparse.HelpFormatter):
    """One line of usage with what is required; values are named by their type; lines that begin with blanks stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {"int": "N", "float": "X", "Path": "PATH"}
        return names.get(getattr(action.type, "__name__", ""), "TEXT")

    def _format_usage(self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None) -> str:
        if usage is not None:
            return super()._format_usage(usage, actions, groups, prefix)
        needed = [action for action in actions if action.required or not action.option_strings]
        return super()._format_usage(None, needed, [], prefix).rstrip() + " [options]\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLE):
            # A command is broken as a shell takes it, and never between an option and its value.
            command = re.sub(r"( --[\w-]+) (?!-)", "\\1\0", text.removeprefix(_EXAMPLE))
            lines = textwrap.wrap(command, width - 6, break_long_words=False, break_on_hyphens=False)
            return "Example:\n  " + " \\\n    ".join(lines).replace("\0", " ")
        return "\n".join(
            line if line.startswith("  ") else super(Help, self)._fill_text(line, width, indent) for line in text.splitlines()
        )


class Parser(argparse.ArgumentParser):
    """A parser that writes its help with `Help`; so do the parsers of its commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help, **settings})
