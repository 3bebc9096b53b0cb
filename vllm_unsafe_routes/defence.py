"""Attacks and utility measured under a defence: what `evaluate` tabulates and `derive-policy` decides by.

Every function is a search or a list of them, so that all prompts, attacks and seeds share one engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .extras import RouteExtras
from .policy import RoutePolicy
from .search.adaptive import Library
from .search.backend import Request, Search, Stats, run_tasks, with_notes
from .search.fsour import FsourSettings
from .search.masking import MaskSettings
from .search.masks import rng_of
from .search.suffix import SuffixSettings, suffix_search
from .study.bench import Bench
from .study.jobs import answer, fsour_record, mask_record
from .study.model import Item, Model, Wrapper
from .study.records import Matrix, Utility

ATTACKS = ("none", "random-masks", "random-layers", "rosais", "fsour", "fsour-adaptive", "suffix", "suffix-transfer", "file")


@dataclass(frozen=True, slots=True)
class Defence:
    """A column of the matrix.

    Attributes:
        name: for the table.
        wrapper: text around every prompt.
        policy: route policy, or None.
        jitter: largest noise on a router logit; 0: none.

    """

    name: str
    wrapper: Wrapper
    policy: RoutePolicy | None = None
    jitter: float = 0.0


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


def attack_search(
    attack: str,
    bench: Bench,
    item: Item,
    seed: int,
    *,
    wrapper: Wrapper,
    ranking: Sequence[int],
    masks: MaskSettings,
    fsour: FsourSettings,
    suffix: SuffixSettings,
    library: Library | None = None,
    words: Sequence[str] = (),
    found_suffixes: Mapping[tuple[int, str], Sequence[str]] | None = None,
) -> Search[Matrix]:
    """One attack on one prompt; the record's defence is empty.

    Args:
        attack: one of `ATTACKS` but `file`, which is `none` on other prompts.
        bench: with the backend under the defence.
        item: the prompt, rendered under the defence.
        seed: of the attack's draws.
        wrapper: the prompt-level defence, for suffixes.
        ranking: layers by RoSais.
        masks: settings of router masking; `num_layers` is the number that counts.
        fsour: settings of F-SOUR.
        suffix: settings of the suffix search.
        library: for the adaptive strategy.
        words: what suffixes are made of.
        found_suffixes: for `suffix-transfer`, (seed, prompt id) -> the suffix found on the undefended model.

    """
    made = partial(Matrix, attack=attack, defence="", prompt=item.prompt.id, category=item.record.category, seed=seed)
    if attack in ("none", "file"):
        judged = yield from answer(bench, item, None)
        return made(**judged.fields())
    if attack in ("fsour", "fsour-adaptive"):
        strategy = "adaptive" if attack == "fsour-adaptive" else fsour.strategy
        found_route = yield from with_notes(
            fsour_record(bench, item, replace(fsour, seed=seed, strategy=strategy), library),
            # A matrix cell is short: it starts again after a kill, so what a search has so far is not kept.
            lambda value: None,
        )
        kept = ("success", "score", "error", "attempts", "candidates", "computed_tokens", "tokens", "final", "prompt_tokens")
        return made(**{name: getattr(found_route, name) for name in kept})
    if attack in ("rosais", "random-layers", "random-masks"):
        settings = replace(masks, seed=seed)
        record = yield from mask_record(bench, item, attack, ranking, settings, [settings.num_layers])
        judged = record.answers[settings.num_layers]
        return made(candidates=record.candidates, masks=record.masks, **judged.fields())
    if attack == "suffix-transfer":
        suffix_words: Sequence[str] = (found_suffixes or {}).get((seed, item.prompt.id), ())
        queries = 0
    else:
        found = yield from suffix_search(
            bench.backend,
            item.prompt.id,
            lambda chosen: bench.model.encode_chat(wrapper.text(" ".join([item.record.goal, *chosen])), wrapper.system),
            item.prompt.target,
            words,
            replace(suffix, seed=seed),
            rng_of("suffix", seed, item.prompt.id),
        )
        suffix_words, queries = found.words, found.queries
    tokens = bench.model.encode_chat(wrapper.text(" ".join([item.record.goal, *suffix_words])), wrapper.system)
    attacked = Item(item.record, replace(item.prompt, token_ids=tokens))
    judged = yield from answer(bench, attacked, None)
    return made(suffix=tuple(suffix_words), candidates=queries, **judged.fields())


def utility_record(bench: Bench, item: Item, kind: str) -> Search[Utility]:
    """Whether a harmless prompt gets its answer; the record's defence is empty.

    `success` of the judge means here that the answer is right.
    """
    judged = yield from answer(bench, item, None)
    right = judged.success
    # Neither right nor refused is a wrong answer; only an exact judge can tell the two apart. None: no verdict.
    refused = None if right is None else (judged.label or ("complied" if right else "refused")) == "refused"
    return Utility(defence="", kind=kind, prompt=item.prompt.id, seed=0, right=right, refused=refused)


def collect_routes(bench: Bench, items: Sequence[Item]) -> list[Any]:
    """The model's own routes on prompts: int32 [num_tokens, num_moe_layers, top_k] each."""

    def one(item: Item) -> Search[Any]:
        (response,) = yield [Request(item.prompt.token_ids, RouteExtras(wants_routes=True))]
        return response.route_ids[: len(item.prompt.token_ids)]

    tasks = [(at, one(item)) for at, item in enumerate(items)]
    found = dict(run_tasks(bench.backend, tasks))
    return [found[at] for at in range(len(items))]


def measure(
    bench: Bench,
    items: Sequence[Item],
    benign: Sequence[Item],
    category: Sequence[Item],
    attacks: Sequence[str],
    seeds: Sequence[int],
    **settings: Any,
) -> dict[str, float]:
    """Attack success and utility under the bench's backend, as plain means; for decisions, not for reports.

    Returns:
        ASR by attack, `benign` (share right), `over_refusal` (share of category prompts refused), `tokens` computed.

    """
    stats = Stats()
    tasks: list[tuple[Any, Any]] = [
        ((attack, seed, item.prompt.id), attack_search(attack, bench, item, seed, **settings))
        for attack in attacks
        for seed in seeds
        for item in items
    ]
    tasks += [(("benign", 0, item.prompt.id), utility_record(bench, item, "benign")) for item in benign]
    tasks += [(("category", 0, item.prompt.id), utility_record(bench, item, "category")) for item in category]
    rows: dict[str, list[float]] = {}
    for (kind, _, _), record in run_tasks(bench.backend, tasks, stats=stats):
        value = record.success if isinstance(record, Matrix) else record.refused if kind == "category" else record.right
        rows.setdefault("over_refusal" if kind == "category" else kind, []).append(float(bool(value)))
    means = {kind: sum(values) / len(values) for kind, values in rows.items()}
    return {**means, "tokens": float(stats.computed_tokens)}
