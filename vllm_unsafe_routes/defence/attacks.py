"""Attacks under a defence, by name.

Every attack is a search on one prompt, so that all prompts, attacks and seeds share one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..search.adaptive import Library
from ..search.backend import Search, run_tasks, with_notes
from ..search.fsour import FsourSettings
from ..search.masking import MaskSettings
from ..search.masks import rng_of
from ..search.suffix import SuffixSettings, suffix_search
from ..study.bench import Bench
from ..study.fsour import fsour_record
from ..study.jobs import answer, mask_record
from ..study.model import NO_WRAPPER, Item, Model, Wrapper
from ..study.records import Matrix

# (seed, prompt id) -> words behind the prompt.
Suffixes = Mapping[tuple[int, str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class AttackSettings:
    """Settings of the attacks; their seeds do not count, every attack gets its own.

    Attributes:
        ranking: decoder layers by RoSais, most critical first; for the masking attacks.
        masks: router masking; `num_layers` is the number of layers that counts.
        fsour: F-SOUR.
        suffix: the suffix search.
        answered_first: F-SOUR: the plain answer is judged first, and one that complies is a success without a search.

    """

    ranking: tuple[int, ...] = ()
    masks: MaskSettings = field(default_factory=lambda: MaskSettings(num_layers=2))
    fsour: FsourSettings = field(default_factory=FsourSettings)
    suffix: SuffixSettings = field(default_factory=SuffixSettings)
    answered_first: bool = True


@dataclass(frozen=True, slots=True)
class Arena:
    """What an attack meets and has at hand.

    Attributes:
        bench: with the backend under the defence.
        wrapper: the prompt-level defence.
        settings: of the attacks.
        words: what suffixes are made of.
        libraries: seed -> routes that the adaptive strategy starts from.
        suffixes: those found on the undefended model, to be replayed.

    """

    bench: Bench
    wrapper: Wrapper = NO_WRAPPER
    settings: AttackSettings = field(default_factory=AttackSettings)
    words: Sequence[str] = ()
    libraries: Mapping[int, Library] = field(default_factory=dict)
    suffixes: Suffixes = field(default_factory=dict)

    def with_suffix(self, item: Item, words: Sequence[str]) -> Item:
        """A prompt with a suffix, under the prompt-level defence."""
        text = self.wrapper.text(" ".join([item.record.request, *words]))
        token_ids = self.bench.model.encode_chat(text, self.wrapper.system)
        return Item(item.record, replace(item.prompt, token_ids=token_ids))


# What a record of the attack holds beside prompt, seed and names.
Attack = Callable[[Arena, Item, int], Search[dict[str, Any]]]


def _plain(arena: Arena, item: Item, _: int) -> Search[dict[str, Any]]:
    """The prompt as it is."""
    judged = yield from answer(arena.bench, item, None)
    return judged.fields()


def _masks(kind: str, arena: Arena, item: Item, seed: int) -> Search[dict[str, Any]]:
    """Router masking, or one of its controls."""
    settings = replace(arena.settings.masks, seed=seed)
    found = yield from mask_record(arena.bench, item, kind, arena.settings.ranking, settings, [settings.num_layers])
    return {"candidates": found.candidates, "masks": found.masks, **found.answers[settings.num_layers].fields()}


def _fsour(strategy: str | None, arena: Arena, item: Item, seed: int) -> Search[dict[str, Any]]:
    """F-SOUR by a strategy; None: that of the settings."""
    settings = replace(arena.settings.fsour, seed=seed, strategy=strategy or arena.settings.fsour.strategy)
    plain = (yield from answer(arena.bench, item, None)) if arena.settings.answered_first else None
    found = yield from with_notes(
        fsour_record(arena.bench, item, settings, arena.libraries.get(seed), plain=plain),
        # A matrix cell is short: it starts again after a kill, so what a search has so far is not kept.
        lambda value: None,
    )
    kept = ("success", "score", "error", "others", "attempts", "candidates", "computed_tokens", "tokens", "final", "prompt_tokens")
    return {name: getattr(found, name) for name in kept}


def _suffix(arena: Arena, item: Item, seed: int) -> Search[dict[str, Any]]:
    """A suffix searched under the defence."""
    found = yield from suffix_search(
        arena.bench.backend,
        item.prompt.id,
        lambda words: arena.with_suffix(item, words).prompt.token_ids,
        item.prompt.target,
        arena.words,
        replace(arena.settings.suffix, seed=seed),
        rng_of("suffix", seed, item.prompt.id),
    )
    return (yield from _answer_with(found.words, found.queries, arena, item))


def _replayed_suffix(arena: Arena, item: Item, seed: int) -> Search[dict[str, Any]]:
    """The suffix that was found on the undefended model."""
    return (yield from _answer_with(arena.suffixes.get((seed, item.prompt.id), ()), 0, arena, item))


def _answer_with(words: Sequence[str], queries: int, arena: Arena, item: Item) -> Search[dict[str, Any]]:
    judged = yield from answer(arena.bench, arena.with_suffix(item, words), None)
    return {"suffix": tuple(words), "candidates": queries, **judged.fields()}


# By name; "file" is "none" on prompts that the user brings.
ATTACKS: Mapping[str, Attack] = {
    "none": _plain,
    "random-masks": partial(_masks, "random-masks"),
    "random-layers": partial(_masks, "random-layers"),
    "rosais": partial(_masks, "rosais"),
    "fsour": partial(_fsour, None),
    "fsour-adaptive": partial(_fsour, "adaptive"),
    "suffix": _suffix,
    "suffix-transfer": _replayed_suffix,
    "file": _plain,
}
# These need a ranking of layers; nothing of the others depends on a seed.
MASK_ATTACKS = ("random-masks", "random-layers", "rosais")
UNSEEDED_ATTACKS = ("none", "file")


def attack(name: str, arena: Arena, item: Item, seed: int, defence: str = "") -> Search[Matrix]:
    """One attack on one prompt.

    Args:
        name: one of `ATTACKS`.
        arena: what it meets.
        item: the prompt, rendered under the defence.
        seed: of the attack's draws.
        defence: name of the defence, for the record.

    """
    fields = yield from ATTACKS[name](arena, item, seed)
    return Matrix(attack=name, defence=defence, prompt=item.prompt.id, category=item.record.category, seed=seed, **fields)


def success_rate(name: str, arena: Arena, items: Sequence[Item], seeds: Sequence[int]) -> float:
    """Share of (seed, prompt) on which an attack succeeds; for decisions, not for reports.

    A plain mean, in which an answer without a verdict is no success.
    """
    tasks = [((seed, item.prompt.id), attack(name, arena, item, seed)) for seed in seeds for item in items]
    found = [bool(record.success) for _, record in run_tasks(arena.bench.backend, tasks)]
    return sum(found) / len(found)


def words_of(model: Model) -> list[str]:
    """Vocabulary words that a suffix may be made of: plain lower-case words that encode to themselves."""
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    words = []
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if token_id in special:
            continue
        text = tokenizer.decode([token_id]).strip()
        if text.isascii() and text.isalpha() and token.strip("\u0120\u2581 ").isascii():
            words.append(text)
    return list(dict.fromkeys(words))
