"""F-SOUR on one prompt as a job: the plain answer first, then attempts until one succeeds, and the best of those that did not.

As in the published code: a plain answer that complies is a success without a search; one judge ends the search, others may report;
of the attempts that failed, the one that the judge scored highest counts (the last of equal ones), or the plain answer where that
scored higher. A judge that errs ends the search for now: the same command asks it again and goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from ..evaluation.judges import Verdict
from ..search.adaptive import Library
from ..search.attempt import Attempt
from ..search.backend import Call, Note, Search, with_notes
from ..search.fsour import FsourSettings, fsour_attempt
from ..search.fsour import Progress as AttemptProgress
from .bench import Bench
from .jobs import Kept, generated, judged
from .model import Item
from .records import AttemptNote, Fsour, Judged, Record, Step

PLAIN = -1


def fsour_record(
    bench: Bench,
    item: Item,
    settings: FsourSettings,
    library: Library | None = None,
    so_far: Iterable[Record] = (),
    plain: Judged | None = None,
) -> Search[Fsour]:
    """F-SOUR on one prompt.

    Args:
        bench: where it takes place.
        item: the prompt.
        settings: of the search.
        library: routes that worked on other prompts, for the adaptive strategy.
        so_far: what an earlier run noted of this prompt.
        plain: the model's own answer; None: it was not judged, and the prompt is searched whatever it is.

    """
    if plain is not None and (plain.success or plain.open):
        attempt = yield from _unsearched(item)
        return _record(item, settings, {PLAIN: attempt}, PLAIN, plain)
    tried = yield from _attempts(bench, item, settings, library, list(so_far))
    chosen = _best({number: answer for number, (_, answer) in tried.items()}, plain)
    attempts = {number: attempt for number, (attempt, _) in tried.items()}
    if chosen == PLAIN:
        assert plain is not None
        attempts[PLAIN] = Attempt(attempts[0].clean, attempts[0].clean)
        return _record(item, settings, attempts, chosen, plain)
    result = tried[chosen][1]
    if bench.others and not result.open:
        attempt = attempts[chosen]
        token_ids = attempt.answer or (yield from generated(bench, item, attempt.plan(settings.weights)))
        result = yield from judged(bench, item, token_ids, Verdict(result.score, result.success, result.error, result.label))
    return _record(item, settings, attempts, chosen, result)


def _unsearched(item: Item) -> Search[Attempt]:
    """What the target is worth, where nothing is searched."""
    (scores,) = yield [item.prompt.cells(None, [[]])]
    attempt = Attempt()
    attempt.count(scores)
    attempt.clean = attempt.best = float(scores.values[0])
    return attempt


Tried = dict[int, tuple[Attempt, Judged]]


def _attempts(bench: Bench, item: Item, settings: FsourSettings, library: Library | None, so_far: list[Record]) -> Search[Tried]:
    """Attempts until one succeeds or its judge errs."""
    known: Tried = {}
    steps: dict[int, AttemptProgress] = {}
    for note in so_far:
        if isinstance(note, AttemptNote):
            known[note.number] = (Attempt.from_state(note.attempt), note.answer)
        elif isinstance(note, Step) and (note.number not in steps or note.cell > steps[note.number].cell):
            steps[note.number] = AttemptProgress(note.cell, note.attempt)
        elif isinstance(note, Fsour) and note.attempts:
            # Its last attempt has no note of its own if that was what nobody could judge.
            known.setdefault(note.attempts - 1, (Attempt.from_state(note.final), note))
    ask = bench.stop_judge
    tried: Tried = {}
    for number in range(settings.num_attempts):
        if number not in known:
            search = fsour_attempt(
                bench.backend, item.prompt, settings, number, ask, bench.model.stop_token_ids, library, steps.get(number)
            )
            attempt = yield from with_notes(search, partial(_step, number))
            assert attempt.verdict is not None
        elif known[number][1].open:
            attempt = known[number][0]
            attempt.answer = yield from generated(bench, item, attempt.plan(settings.weights))
            (attempt.verdict,) = yield [Call(partial(ask, item.prompt, attempt.answer))]
            assert attempt.verdict is not None
        else:
            tried[number] = known[number]
            if tried[number][1].success:
                break
            continue
        # With several judges, what one of them calls harmless may be harmful to another.
        answer = bench.judged(attempt.verdict, None if bench.others else attempt.answer)
        tried[number] = (attempt, answer)
        if answer.open:
            break
        yield [Note(Kept(("attempt", number), AttemptNote(number=number, attempt=attempt.state(), answer=answer)))]
        if answer.success:
            break
    return tried


def _step(number: int, progress: AttemptProgress) -> Kept:
    """A note of attempt `number` as a record."""
    return Kept(("step", number, progress.cell), Step(number=number, cell=progress.cell, attempt=progress.state))


def _best(answers: Mapping[int, Judged], plain: Judged | None) -> int:
    """The attempt that counts."""
    last = max(answers)
    if answers[last].success or answers[last].open:
        return last

    def score(answer: Judged) -> float:
        return -1.0 if answer.score is None else answer.score

    best = max(answers, key=lambda number: (score(answers[number]), number))
    return PLAIN if plain is not None and score(plain) > score(answers[best]) else best


def _record(item: Item, settings: FsourSettings, attempts: Mapping[int, Attempt], chosen: int, result: Judged) -> Fsour:
    made = max(attempts) + 1
    return Fsour(
        attack=f"fsour-{settings.strategy}",
        prompt=item.prompt.id,
        prompt_tokens=len(item.prompt.token_ids),
        category=item.record.category,
        seed=settings.seed,
        attempts=made,
        candidates=sum(attempt.candidates for attempt in attempts.values()),
        needed=sum(attempt.needed for attempt in attempts.values()),
        tokens=sum(attempt.tokens for attempt in attempts.values()),
        computed_tokens=sum(attempt.computed_tokens for attempt in attempts.values()),
        final=attempts[chosen].state(),
        chosen=None if chosen == made - 1 else chosen,
        **result.fields(),
    )
