"""A route policy from what searches found, chosen by measuring.

Candidates come from several rules and sizes (`policies.py`, `greedy.py`); each is measured on prompts that the searches did not see
(`trials.py`); the best bans are combined with the best protections; the best of all that keeps the utility budget is written.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..evaluation.datasets import PromptRecord
from ..extras import RouteExtras
from ..policy import RoutePolicy
from ..search.backend import Backend, Request, Search, run_tasks
from ..search.fsour import FsourSettings
from ..search.rosais import share_masks
from ..study.bench import Bench
from ..study.campaign import Campaign, read_settings
from ..study.model import NO_WRAPPER, Item
from ..study.records import Record, Rosais, read
from ..study.settings import Setup
from ..study.summary import layer_scores
from ..study.workspace import Workspace
from . import policies
from .attacks import Arena, AttackSettings, words_of
from .paths import SEED_STEP, GreedyTrials, Paths, find_suffixes, opened_by
from .policies import Experts
from .trials import Budget, Trial, Trials, kept
from .utility import UtilityPrompts

RULES = policies.PROTECT_RULES + policies.BAN_RULES
NUM_CONTROLS = 3
# Settings of the run that a policy's provenance repeats.
_PROVENANCE = ("model", "data", "seeds", "runs", "layers", "budget", "over_refusal", "confidence", "utility")


@dataclass(frozen=True, kw_only=True)
class DeriveStudy(Setup):
    """A derivation.

    Attributes:
        runs: folders of rosais (with the same masks for all prompts) and fsour runs on the same model.
        utility: harmless prompts for the budget.
        rules: of `RULES`; empty: all that the runs allow.
        num_layers: top RoSais layers that the policy may touch.
        bans: bans a layer to try.
        protections: protected experts a layer to try, below top_k.
        budget: what the policy may cost.
        replay_suffixes: whether candidates also face suffixes that were found on the undefended model.
        suffixes: suffixes searched for each prompt and seed.
        greedy: the rule greedy.
        keep: best ban and protect candidates that are combined.
        fsour: F-SOUR, re-run adaptively under each candidate; its seed is that of `seeds` in turn.

    """

    runs: tuple[Path, ...]
    utility: UtilityPrompts
    rules: tuple[str, ...] = ()
    num_layers: int = 5
    bans: tuple[int, ...] = (2, 4, 6)
    protections: tuple[int, ...] = (1, 2, 3)
    budget: Budget = field(default_factory=Budget)
    replay_suffixes: bool = True
    suffixes: int = 3
    greedy: GreedyTrials = field(default_factory=GreedyTrials)
    keep: int = 2
    fsour: FsourSettings = field(default_factory=FsourSettings)

    def __post_init__(self) -> None:
        if self.engine.policy is not None:
            raise RouteError("a policy is derived on an engine without one")
        for rule in self.rules:
            if rule not in RULES:
                raise RouteError(f"rule {rule!r} is not one of {', '.join(RULES)}")
        if "greedy-bias" in self.rules and not self.greedy.steps:
            raise RouteError("the rule greedy-bias needs steps: give --bias")

    @property
    def suffix_seeds(self) -> list[int]:
        """One for each of a prompt's suffixes."""
        return [seed + SEED_STEP * number for seed in self.seeds for number in range(self.suffixes)]


@dataclass(frozen=True, slots=True)
class Derived:
    """What a derivation gives.

    Attributes:
        policy: with its provenance. In the run's folder as `policy.json`, with `control-N.json` of random experts beside it.
        best: the chosen candidate.
        undefended: what holds without a policy.

    """

    policy: RoutePolicy
    best: Trial
    undefended: Trial


def derive(study: DeriveStudy, backend: Backend | None = None, say: Callable[[str], None] = lambda line: None) -> Derived:
    """Measure candidates and write the best policy.

    Args:
        study: what to do.
        backend: an engine without a policy, already open; None: as the study says.
        say: gets a line for each candidate.

    Raises:
        RouteError: runs of another model, a rule that lacks its records, too few benign prompts, no candidate within the budget.

    """
    workspace = Workspace(study, backend)
    shape = workspace.model.shape
    records = _records_of(study.runs, shape.fingerprint)
    scored = [record for record in records if isinstance(record, Rosais)]
    layers = list(layer_scores(scored).ranking if scored else shape.moe_layers)[: study.num_layers]
    harmless = study.utility.read()
    study.budget.check(len(harmless["benign"]))
    rules = _wanted_rules(study, records)
    with workspace.campaign("derive-policy", _own_settings(study, rules, layers, harmless)) as campaign:
        with workspace.bench() as bench:
            trials, opened = _prepared(workspace, study, campaign, bench, harmless, say)
            best = _Derivation(study, layers, records, trials, opened).best_of(rules)
        campaign.finish({"policy": best.name, "measured": best.measured, "undefended": trials.undefended.measured})
    provenance = {
        "tool": "unsafe-routes derive-policy",
        "date": datetime.date.today().isoformat(),
        "rule": best.name,
        "undefended": trials.undefended.measured,
        "measured": best.measured,
        **{name: campaign.settings[name] for name in _PROVENANCE},
    }
    policy = policies.combine(shape, best.bans, best.protections, provenance, best.biases)
    policy.save(study.out / "policy.json")
    for number in range(NUM_CONTROLS):
        policies.random_control(policy, shape, number, best.name).save(study.out / f"control-{number}.json")
    return Derived(policy, best, trials.undefended)


def _records_of(runs: Sequence[Path], fingerprint: str) -> list[Record]:
    for folder in runs:
        found = read_settings(folder).get("fingerprint")
        if found != fingerprint:
            raise RouteError(f"{folder} is of model {found}, this is {fingerprint}")
    return [record for folder in runs for record in read(folder, Record)]


def _wanted_rules(study: DeriveStudy, records: Sequence[Record]) -> list[str]:
    """In the order of `RULES`: greedy bans leave alone what is protected."""
    if study.rules:
        return [rule for rule in RULES if rule in study.rules]
    kinds = {None, *map(type, records)}
    left_out = set()
    if not share_masks(policies.of_first_seed(records)):
        left_out.add("dataset-route")
    if not study.replay_suffixes:
        left_out |= set(policies.GREEDY_RULES)
    if not study.greedy.steps:
        left_out.add("greedy-bias")
    return [rule for rule in RULES if policies.NEEDS.get(rule) in kinds and rule not in left_out]


def _own_settings(
    study: DeriveStudy, rules: Sequence[str], layers: Sequence[int], harmless: Mapping[str, Sequence[PromptRecord]]
) -> dict[str, Any]:
    """What decides the results, as the run's folder has it."""
    return {
        "runs": [str(folder) for folder in study.runs],
        "rules": rules,
        "layers": layers,
        "bans": study.bans,
        "protections": study.protections,
        "budget": study.budget.share,
        "over_refusal": study.budget.over_refusal,
        "confidence": study.budget.confidence,
        "suffix": study.replay_suffixes,
        "suffixes": study.suffixes,
        "greedy_bans": study.greedy.bans,
        "greedy_weight": study.greedy.weight,
        "greedy_harmless": study.greedy.harmless,
        "bias": study.greedy.steps,
        "greedy_again": study.greedy.again,
        "keep": study.keep,
        "fsour": str(_fsour(study)),
        "utility": {kind: len(found) for kind, found in harmless.items()},
    }


def _fsour(study: DeriveStudy) -> FsourSettings:
    return replace(study.fsour, max_new_tokens=study.judging.max_new_tokens)


def _prepared(
    workspace: Workspace,
    study: DeriveStudy,
    campaign: Campaign,
    bench: Bench,
    harmless: Mapping[str, Sequence[PromptRecord]],
    say: Callable[[str], None],
) -> tuple[Trials, list[Item]]:
    """Where candidates are measured, and the prompts with the suffixes that open the undefended model."""
    items, rendered = workspace.items, {kind: workspace.render(found, NO_WRAPPER) for kind, found in harmless.items()}
    known = {item.prompt.id: item for group in (items, *rendered.values()) for item in group}
    bench = replace(bench, **workspace.judges.on(workspace.model, known))
    arena = Arena(bench, settings=AttackSettings(fsour=_fsour(study), answered_first=False), words=words_of(workspace.model))
    attacks: dict[str, Sequence[int]] = {"fsour-adaptive": study.seeds}
    opened: list[Item] = []
    seeds = study.suffix_seeds
    if study.replay_suffixes and seeds:
        suffixes = kept(campaign, "suffixes", lambda: find_suffixes(arena, items, seeds))
        opened = opened_by(arena, items, suffixes)
        arena = replace(arena, suffixes={(seed, prompt): words for seed, prompt, words, _ in suffixes.found})
        # What meets suffixes that are searched again on the way is measured so.
        attacks |= {"suffix": study.seeds} if study.greedy.again else {"suffix-transfer": seeds}
    return Trials(campaign, arena, items, rendered, attacks, study.budget, say), opened


class _Derivation:
    """Candidates by rule.

    Args:
        study: what to do.
        layers: layers that the policy may touch, most important first.
        records: what the runs found.
        trials: measures candidates.
        opened: prompts with a suffix that the undefended model complies with.

    """

    def __init__(
        self, study: DeriveStudy, layers: Sequence[int], records: Sequence[Record], trials: Trials, opened: Sequence[Item]
    ) -> None:
        self.study, self.layers, self.records = study, layers, records
        self.trials, self.opened = trials, opened
        self.bench, self.shape = trials.arena.bench, trials.shape

    def best_of(self, rules: Sequence[str]) -> Trial:
        """Measure everything that these rules give, and combine the best."""
        trials = self.trials
        trials.say(f"undefended: {trials.undefended}")
        protections: list[Trial] = []
        bans: list[Trial] = []
        for rule in rules:
            if rule in policies.GREEDY_RULES:
                bans += self._greedy(rule, trials.best(protections)[:1])
            elif rule in policies.BAN_RULES:
                room = self.shape.num_experts - self.shape.top_k
                bans += [trials.measure(name, taken, {}) for name, taken in self._ranked(rule, self.study.bans, room)]
            else:
                sizes, room = self.study.protections, self.shape.top_k - 1
                protections += [trials.measure(name, {}, taken) for name, taken in self._ranked(rule, sizes, room)]
        both = [
            trials.measure(f"{one.name}+{other.name}", one.bans, other.protections, one.biases)
            for one in trials.best(bans)[: self.study.keep]
            for other in trials.best(protections)[: self.study.keep]
        ]
        ordered = trials.best([*bans, *protections, *both])
        if not ordered:
            share = self.study.budget.share
            raise RouteError(f"no candidate keeps the budget of {share}: the policy would cost too much; nothing was written")
        return ordered[0]

    def _ranked(self, rule: str, sizes: Sequence[int], room: int) -> Iterator[tuple[str, Experts]]:
        """Names and experts of a rule's candidates: the first ones of each layer, by size."""
        choices = self._choices(rule)
        for size in sizes:
            taken = policies.take(choices, size, self.layers)
            if size <= room and taken:
                yield f"{rule}/{size}", taken

    def _choices(self, rule: str) -> list[policies.Choice]:
        if rule == "dataset-route":
            return policies.dataset_route(self.records)
        if rule in ("effect", "protect"):
            return policies.ranked(policies.presence_effect(self.records, self.shape), 1.0 if rule == "effect" else -1.0)
        own = self._frequency(self.trials.items)
        if rule == "lift":
            accepted = policies.accepted_frequency(self.records, self.shape)
            return policies.ranked({layer: accepted[layer] - own[layer] for layer in accepted})
        # Pairs: each prompt with and without the suffix that opened it; without suffixes, answered and refused prompts.
        answered = self._frequency(self.opened or self.trials.harmless["benign"][: len(self.trials.items)])
        return policies.ranked({layer: answered[layer] - own[layer] for layer in own})

    def _frequency(self, items: Sequence[Item]) -> dict[int, npt.NDArray[np.float64]]:
        """Per layer, how often the model's own routes on prompts hold each expert."""

        def one(item: Item) -> Search[Any]:
            (response,) = yield [Request(item.prompt.token_ids, RouteExtras(wants_routes=True))]
            assert response.route_ids is not None
            return response.route_ids[: len(item.prompt.token_ids)]

        routes = run_tasks(self.bench.backend, [(at, one(item)) for at, item in enumerate(items)])
        return policies.route_frequency((ids for _, ids in routes), self.shape)

    def _greedy(self, rule: str, protections: Sequence[Trial]) -> list[Trial]:
        """Candidates of a greedy rule: the first additions of each path, by size; protected experts are not pushed out."""
        if not self.opened:
            self.trials.say(f"{rule}: no suffix opened a prompt, so there is nothing to close")
            return []
        pinned = {(layer, expert) for one in protections for layer, experts in one.protections.items() for expert in experts}
        tried = []
        paths = Paths(self.trials, self.study.greedy, self.layers, self.opened, self.study.suffix_seeds[-1:])
        for share, added in paths.of_rule(rule, pinned):
            for size in sorted({size for size in self.study.greedy.bans if size < len(added)} | {len(added)} - {0}):
                bans, biases = policies.additions(added[:size])
                tried.append(self.trials.measure(f"{rule}-{share:.3g}/{size}", bans, {}, biases))
        return tried
