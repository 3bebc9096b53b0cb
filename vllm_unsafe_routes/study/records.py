"""What a run folder holds: one type for each kind of record.

A line of `records.jsonl` is one record's fields beside its `key` and its `type`, the tag of the class. A field whose default is
None is left out of the line while it is None. Layers and numbers of layers are integers here and JSON's strings in the file.

A record whose judge erred is `open`: the same command asks again, and what it is told stands under the job's key, `again` and a
number. The last one counts.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..evaluation.judges import is_final
from ..search.attempt import AttemptState
from .campaign import KEY_FIELD, CampaignError, Key, read_lines

AGAIN = "again"
Masks = tuple[tuple[int, tuple[int, ...]], ...]


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What all records share: they are values, and a field that nobody knows is an error."""

    @property
    def open(self) -> bool:
        """Whether a judge gave no verdict that it may give when asked again."""
        return False


class Opinion(Record, frozen=True, kw_only=True):
    """What a further judge says of an answer; the fields are those of `Judged`."""

    success: bool | None
    score: float | None
    error: str | None = None


class Judged(Record, frozen=True, kw_only=True):
    """A judge's verdict on an answer.

    Attributes:
        success: whether the answer complied; None: no verdict.
        score: 0 (harmless) to 1; None: no verdict.
        error: why there is no verdict, `kind: details`.
        label: an exact judge's own word.
        completion: the answer. Without `--keep-completions` only of answers that were judged harmless, by every judge.
        others: what further judges say, by their names.

    """

    success: bool | None
    score: float | None
    error: str | None = None
    label: str | None = None
    completion: str | None = None
    others: dict[str, Opinion] | None = None

    @property
    def open(self) -> bool:
        """See `Record`."""
        others = self.others or {}
        return not (is_final(self.error) and all(is_final(one.error) for one in others.values()))

    def fields(self) -> dict[str, Any]:
        """For a record that holds this verdict."""
        return {name: getattr(self, name) for name in Judged.__struct_fields__}


class Answer(Judged, frozen=True, kw_only=True, tag_field="type", tag="answer"):
    """The model's own answer to a prompt."""

    attack: str
    prompt: str
    category: str


class Rosais(Record, frozen=True, kw_only=True, tag_field="type", tag="rosais"):
    """RoSais of one prompt.

    Attributes:
        clean: p(Q) without a mask, nats.
        scores: layer -> RoSais(Q, layer), nats.
        gains: layer -> the gain of each mask, nats.
        masks: layer -> the experts of each mask.

    """

    prompt: str
    category: str
    seed: int
    clean: float
    scores: dict[int, float]
    gains: dict[int, tuple[float, ...]]
    masks: dict[int, tuple[tuple[int, ...], ...]]


class Mask(Record, frozen=True, kw_only=True, tag_field="type", tag="mask"):
    """Router masking of one prompt.

    Attributes:
        clean: p(Q) without masks, nats.
        masked: under all masks.
        masks: (layer, experts), in the order in which they were chosen.
        candidates: plans scored.
        answers: number of masked layers -> the verdict.

    """

    attack: str
    prompt: str
    category: str
    seed: int
    clean: float
    masked: float
    masks: Masks
    candidates: int
    answers: dict[int, Judged]

    @property
    def open(self) -> bool:
        """See `Record`."""
        return any(answer.open for answer in self.answers.values())


class DatasetMask(Record, frozen=True, kw_only=True, tag_field="type", tag="dataset-mask"):
    """Router masking with one set of masks for all prompts.

    Attributes:
        level: number of masked layers.
        answers: prompt -> the verdict.

    The others are those of `Mask`.

    """

    attack: str
    level: int
    seed: int
    clean: float
    masked: float
    masks: Masks
    candidates: int
    answers: dict[str, Judged]

    @property
    def open(self) -> bool:
        """See `Record`."""
        return any(answer.open for answer in self.answers.values())


class Step(Record, frozen=True, kw_only=True, tag_field="type", tag="step"):
    """How far an F-SOUR attempt has come.

    Attributes:
        number: of the attempt.
        cell: the next cell, see `search.fsour.cells`.
        attempt: what it has so far.

    """

    number: int
    cell: int
    attempt: AttemptState


class AttemptNote(Record, frozen=True, kw_only=True, tag_field="type", tag="attempt"):
    """One F-SOUR attempt, over and judged."""

    number: int
    attempt: AttemptState
    answer: Judged


class Fsour(Judged, frozen=True, kw_only=True, tag_field="type", tag="fsour"):
    """F-SOUR on one prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        attempts: how many were made; the counts that follow are sums over them, as in `search.attempt.Attempt`. 0: none, because
            the plain answer complied already, or nobody could say whether it did.
        chosen: the attempt whose answer was judged, from 0 on; -1: the plain answer, which the judge scored higher than all of
            theirs; None: the last attempt.
        final: that attempt.

    """

    attack: str
    prompt: str
    prompt_tokens: int
    category: str
    seed: int
    attempts: int
    candidates: int
    needed: int
    tokens: int
    computed_tokens: int
    final: AttemptState
    chosen: int | None = None


class Recipe(Judged, frozen=True, kw_only=True, tag_field="type", tag="recipe"):
    """What a recipe chose for one prompt; see `study.recipes`.

    Attributes:
        clean: log-probability of the target without a plan, nats.
        found: under the plan.
        plan: its string.
        candidates: plans scored.

    """

    attack: str
    prompt: str
    category: str
    seed: int
    clean: float
    found: float
    plan: str
    candidates: int


class Controls(Record, frozen=True, kw_only=True, tag_field="type", tag="controls"):
    """What the route of one prompt owes to its experts and what to their weights; see `study.controls`. Log-probabilities in nats.

    Attributes:
        weights: those of the search.
        cells: accepted choices of the route.
        clean: of the target without a plan.
        found: under the route.
        native: under its experts with native weights.
        own: under the model's own experts with masked weights at the same cells.
        own_everywhere: the same at every cell of the prompt.
        randoms: under random experts with masked weights at the same cells.

    """

    attack: str
    prompt: str
    category: str
    seed: int
    weights: str
    cells: int
    clean: float
    found: float
    native: float
    own: float
    own_everywhere: float
    randoms: tuple[float, ...]

    def value(self, name: str) -> float:
        """A control by its name; of the random routes `random` is the mean and `best_random` the best."""
        if name == "random":
            return sum(self.randoms) / len(self.randoms)
        value: float = max(self.randoms) if name == "best_random" else getattr(self, name)
        return value


class Matrix(Judged, frozen=True, kw_only=True, tag_field="type", tag="matrix"):
    """One attack on one prompt under one defence. What an attack does not have is None."""

    attack: str
    defence: str
    prompt: str
    category: str
    seed: int
    candidates: int | None = None
    # F-SOUR.
    prompt_tokens: int | None = None
    attempts: int | None = None
    tokens: int | None = None
    computed_tokens: int | None = None
    final: AttemptState | None = None
    # Masks.
    masks: Masks | None = None
    # Suffixes.
    suffix: tuple[str, ...] | None = None


class Utility(Record, frozen=True, kw_only=True, tag_field="type", tag="utility"):
    """Whether a harmless prompt gets its answer under a defence.

    Attributes:
        kind: `benign` or `category`.
        right: None: no verdict.
        refused: None: no verdict.
        error: why there is no verdict.

    """

    defence: str
    kind: str
    prompt: str
    seed: int
    right: bool | None
    refused: bool | None
    error: str | None = None

    @property
    def open(self) -> bool:
        """See `Record`."""
        return not is_final(self.error)


class Speed(Record, frozen=True, kw_only=True):
    """How fast an engine was."""

    tokens_per_s: float


class Throughput(Record, frozen=True, kw_only=True, tag_field="type", tag="throughput"):
    """Plain generation under a defence."""

    defence: str
    seconds: Speed


class Candidate(Record, frozen=True, kw_only=True, tag_field="type", tag="candidate"):
    """A policy that `derive-policy` measured.

    Attributes:
        policy: its JSON form.
        measured: shares by what was measured.

    """

    name: str
    policy: dict[str, Any]
    measured: dict[str, float]


class Suffixes(Record, frozen=True, kw_only=True, tag_field="type", tag="suffixes"):
    """Suffixes that `derive-policy` found, on the undefended model or under the additions of a greedy path so far.

    Attributes:
        found: (seed, prompt, words, whether the model complied).

    """

    found: tuple[tuple[int, str, tuple[str, ...], bool], ...]


class OwnAnswers(Record, frozen=True, kw_only=True, tag_field="type", tag="answers"):
    """The undefended model's answers to harmless prompts: prompt -> token ids."""

    answers: dict[str, tuple[int, ...]]


class Addition(Record, frozen=True, kw_only=True, tag_field="type", tag="addition"):
    """One ban, or one step of a bias, that a greedy rule added.

    Attributes:
        number: 0 for the first.
        share: the budget of its path.
        stage: how often suffixes had been searched again when it was added.
        layer: decoder layer.
        expert: what was banned or biased there.
        bias: what was added to its bias; None: it was banned.
        steps: steps of biases that its path tries; empty: its path only bans.
        value: what the additions reach together, nats.
        measured: (layer, expert, gain) of the bans tried in the round; None: over the budget.
        measured_steps: (layer, expert, step, gain) of the steps tried.

    """

    number: int
    share: float
    layer: int
    expert: int
    value: float
    measured: tuple[tuple[int, int, float | None], ...]
    bias: float | None = None
    steps: tuple[float, ...] = ()
    measured_steps: tuple[tuple[int, int, float, float | None], ...] = ()
    stage: int = 0


class Work(Record, frozen=True, kw_only=True, tag_field="type", tag="work"):
    """What some time of a run brought; the sums over all of them are the run's cost.

    Attributes:
        attack: what was run, as results name it (`rosais`, `none`, ...).
        defence: in a matrix, under which; else None.
        results: records that ended.
        requests: answered requests.
        candidates: plans scored among them.
        tokens: of these requests, as if each was computed alone.
        computed_tokens: prompt tokens that the engine computed.
        seconds: of the wall clock.
        device: what computed.
        versions: of the programs that took part.

    """

    attack: str
    defence: str | None = None
    results: int
    requests: int
    candidates: int
    tokens: int
    computed_tokens: int
    seconds: float
    device: str
    versions: dict[str, str]


class Unknown(Record, frozen=True, kw_only=True):
    """A record of a type that this version does not know."""

    type: str


KINDS: dict[str, type[Record]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (
        *(Answer, Rosais, Mask, DatasetMask, Step, AttemptNote, Fsour, Recipe, Controls, Matrix, Utility, Throughput),
        *(Candidate, Suffixes, OwnAnswers, Addition, Work),
    )
}


class Entry(NamedTuple):
    """A record and its place in the campaign."""

    key: Key
    record: Record


R = TypeVar("R", bound=Record)


def name_of_type(record: Record) -> str:
    """A record's type as its line says it."""
    return record.type if isinstance(record, Unknown) else str(record.__struct_config__.tag)


def job_of(entry: Entry) -> tuple[Any, ...]:
    """Key of the job that a record belongs to.

    What a search notes stands under the job's own key and two or three parts more, and so does a result that came later.
    """
    key = entry.key if isinstance(entry.key, tuple) else (entry.key,)
    if isinstance(entry.record, Step | AttemptNote):
        return key[: -3 if isinstance(entry.record, Step) else -2]
    return key[:-2] if key[-2:-1] == (AGAIN,) else key


def _plain(error: msgspec.ValidationError) -> str:
    return str(error).replace("`", "'")


def entries(folder: str | os.PathLike[str]) -> Iterator[Entry]:
    """All whole records in a folder, in the order in which they were written; needs no lock.

    Raises:
        CampaignError: a record that lacks a field, has one too many, or one of another type; names file and line.

    """
    for where, fields in read_lines(folder):
        key = fields.pop(KEY_FIELD)
        name = str(fields.get("type"))
        kind = KINDS.get(name)
        if kind is None:
            yield Entry(key, Unknown(type=name))
            continue
        try:
            yield Entry(key, msgspec.convert(fields, kind, str_keys=True))
        except msgspec.ValidationError as error:
            raise CampaignError(f"{where}: record {key!r} of type {name!r}: {_plain(error)}") from None


def current(folder: str | os.PathLike[str]) -> Iterator[Entry]:
    """As `entries`, without results that a later one replaces."""
    last: dict[tuple[Any, ...], Key] = {}
    for _, fields in read_lines(folder):
        key = fields[KEY_FIELD]
        if isinstance(key, tuple) and key[-2:-1] == (AGAIN,):
            last[key[:-2]] = key
    for entry in entries(folder):
        if isinstance(entry.record, Step | AttemptNote) or last.get(job_of(entry), entry.key) == entry.key:
            yield entry


def read(folder: str | os.PathLike[str], *kinds: type[R]) -> Iterator[R]:
    """The records of these types in a folder; see `current`."""
    for entry in current(folder):
        if isinstance(entry.record, kinds):
            yield entry.record
