"""`unsafe-routes derive-policy`: a route policy from what searches found, chosen by measuring."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..defence import attack_search, collect_routes, measure, words_of
from ..errors import RouteError
from ..evaluation.statistics import wilson_bound
from ..policy import RoutePolicy
from ..search import rules
from ..search.backend import Request, Search, run_tasks
from ..search.greedy import Example, GreedySettings, greedy_bans
from ..search.masking import MaskSettings
from ..search.suffix import SuffixSettings
from ..search.under_policy import PolicyBackend
from ..study.bench import Bench
from ..study.campaign import Campaign, read_settings
from ..study.judges import judge_of
from ..study.model import NO_WRAPPER, Item
from ..study.records import Addition, Candidate, OwnAnswers, Record, Rosais, Suffixes, entries, read
from ..study.settings import Setup
from ..study.summary import layer_scores
from ..study.workspace import Workspace
from .options import (
    add_data_options,
    add_fsour_options,
    add_judge_options,
    add_model_options,
    add_utility_options,
    fsour_settings,
    numbers_of,
    setup_of,
    utility_prompts,
)

R = TypeVar("R", bound=Record)
_RULES = rules.PROTECT_RULES + rules.BAN_RULES


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "derive-policy",
        help="derive a route policy from rosais and fsour runs, under a utility budget",
        description="Builds candidate policies by several rules and sizes, measures each on held-out prompts (F-SOUR re-run "
        "adaptively under the policy, replayed suffixes, benign answers, over-refusal), combines the best bans with the best "
        "protections, and writes the best policy that keeps the utility budget, with its provenance. Controls of equal size "
        "with random experts are written beside it.",
        epilog="Example: unsafe-routes derive-policy runs/rosais runs/fsour --model lab --data lab:tune --limit 12 "
        "--dtype float32 --out runs/policy",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of rosais (with --same-masks) and fsour runs")
    add_model_options(parser)
    add_data_options(parser)
    add_judge_options(parser)
    group = parser.add_argument_group("policy")
    group.add_argument("--rule", action="append", choices=_RULES, help="rules to try (default: all that the runs allow)")
    group.add_argument("--layers", type=int, default=5, help="top RoSais layers that the policy may touch (default: 5)")
    group.add_argument("--bans", default="2,4,6", help="bans a layer to try (default: 2,4,6)")
    group.add_argument(
        "--greedy-bans", default="8,16,24,32", help="rule greedy: bans in all to try, beside as many as help (default: 8,16,24,32)"
    )
    group.add_argument(
        "--greedy-weight",
        type=float,
        default=1.0,
        help="rule greedy: nats of attack score that a nat of harmless answers must be worth (default: 1)",
    )
    group.add_argument(
        "--greedy-harmless",
        type=int,
        default=128,
        help="rule greedy: harmless answers that each addition is weighed against, taken evenly (default: 128)",
    )
    group.add_argument("--suffixes", type=int, default=3, help="suffixes searched for each prompt and seed (default: 3)")
    group.add_argument("--protections", default="1,2,3", help="protected experts a layer to try, below top_k (default: 1,2,3)")
    group.add_argument("--budget", type=float, default=0.98, help="share of benign prompts that must stay right (default: 0.98)")
    group.add_argument(
        "--confidence",
        type=float,
        default=0.5,
        help="one-sided confidence with which the harmless prompts must show that the budget holds; 0.5 (default) takes their "
        "share as it is, 0.8 leaves room for prompts that were not seen and wants more of them",
    )
    group.add_argument("--over-refusal", type=float, default=0.02, help="most that over-refusal may rise (default: 0.02)")
    add_utility_options(group, "tune")
    group.add_argument("--no-suffix", action="store_true", help="choose by F-SOUR alone, without replayed suffixes")
    group.add_argument("--keep", type=int, default=2, help="best ban and protect candidates that are combined (default: 2)")
    add_fsour_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    workspace = Workspace(Setup(**setup_of(args)))
    shape = workspace.model.shape
    if workspace.setup.engine.policy is not None:
        raise RouteError("derive-policy starts from an engine without a policy; leave out --policy")
    for folder in args.runs:
        found = read_settings(folder).get("fingerprint")
        if found != shape.fingerprint:
            raise RouteError(f"{folder} is of model {found}, this is {shape.fingerprint}")
    records = [record for folder in args.runs for record in read(folder, Record)]
    scored = [record for record in records if isinstance(record, Rosais)]
    ranking = list(layer_scores(scored).ranking) if scored else list(shape.moe_layers)
    layers = ranking[: args.layers]
    utility = utility_prompts(args, "tune")
    if not utility["benign"]:
        raise RouteError("a utility budget needs benign prompts: give --benign")
    if args.greedy_harmless < 1:
        raise RouteError(f"--greedy-harmless must be at least 1, got {args.greedy_harmless}")
    most = wilson_bound(1.0, len(utility["benign"]), args.confidence)
    if most < args.budget:
        raise RouteError(
            f"{len(utility['benign'])} benign prompts, all right, show a share of {most:.3f} with confidence {args.confidence}, "
            f"below the budget of {args.budget}: give more of them, or a lower --confidence"
        )
    has = {None, *map(type, records)}
    available = [rule for rule in _RULES if rules.NEEDS.get(rule) in has]
    unshared = not rules.share_masks(rules.of_first_seed(scored))
    # In the order of `_RULES`: greedy bans leave alone what is protected.
    wanted = [rule for rule in _RULES if rule in (args.rule or available)]
    if not args.rule:
        wanted = [
            rule for rule in wanted if not (rule == "dataset-route" and unshared) and not (rule == "greedy" and args.no_suffix)
        ]
    own = {
        "runs": [str(folder) for folder in args.runs],
        "rules": wanted,
        "layers": layers,
        "bans": numbers_of(args.bans, "--bans"),
        "protections": numbers_of(args.protections, "--protections"),
        "budget": args.budget,
        "over_refusal": args.over_refusal,
        "confidence": args.confidence,
        "suffix": not args.no_suffix,
        "suffixes": args.suffixes,
        "greedy_bans": numbers_of(args.greedy_bans, "--greedy-bans"),
        "greedy_weight": args.greedy_weight,
        "greedy_harmless": args.greedy_harmless,
        "keep": args.keep,
        "fsour": str(replace(fsour_settings(args), max_new_tokens=args.max_new_tokens)),
        "utility": {kind: len(one) for kind, one in utility.items()},
    }
    with workspace.campaign("derive-policy", own) as campaign:
        with workspace.bench() as bench:
            deriver = _Deriver(args, workspace, campaign, bench, layers, utility)
            best = deriver.derive(wanted, records, own)
        campaign.finish({"policy": best["name"], "measured": best["measured"], "undefended": deriver.undefended})
    return 0


class _Deriver:
    """Candidates, their measurements and the choice.

    Args:
        args: the command's options.
        workspace: what they stand for.
        campaign: one record a candidate, so that an interrupted derivation goes on.
        bench: with an engine without a policy.
        layers: layers that the policy may touch, most important first.
        utility: benign and category prompts.

    """

    def __init__(
        self,
        args: argparse.Namespace,
        workspace: Workspace,
        campaign: Campaign,
        bench: Bench,
        layers: Sequence[int],
        utility: Mapping[str, Any],
    ) -> None:
        self.args, self.workspace, self.campaign, self.layers = args, workspace, campaign, layers
        self.shape = workspace.model.shape
        self.items = workspace.items
        self.extra = {kind: workspace.render(found, NO_WRAPPER) for kind, found in utility.items()}
        known = {item.prompt.id: item for item in [*self.items, *self.extra["benign"], *self.extra["category"]]}
        self.bench = replace(bench, judge=judge_of(workspace.model, workspace.judge, known))
        self.settings: dict[str, Any] = {
            "wrapper": NO_WRAPPER,
            "ranking": list(layers),
            "masks": MaskSettings(num_layers=1, num_masks=20),
            "fsour": replace(fsour_settings(args), max_new_tokens=args.max_new_tokens),
            "suffix": SuffixSettings(),
        }
        # One seed for each of a prompt's suffixes.
        self.suffix_seeds = [seed + 1000 * number for seed in workspace.setup.seeds for number in range(args.suffixes)]
        self.suffixes: dict[tuple[int, str], list[str]] = {}
        # Those that made the undefended model comply.
        self.opening: set[tuple[int, str]] = set()
        self.undefended: dict[str, float] = {}

    def derive(self, wanted: Sequence[str], records: Sequence[Record], own: Mapping[str, Any]) -> dict[str, Any]:
        """Measure everything and write the best policy."""
        if not self.args.no_suffix:
            self._find_suffixes()
        self.undefended = self._measure("none", RoutePolicy({}))["measured"]
        print(f"undefended: {show(self.undefended)}", flush=True)
        protections: list[dict[str, Any]] = []
        bans: list[dict[str, Any]] = []
        for rule in wanted:
            if rule == "greedy":
                bans += self._greedy(own, next(iter(self._best(protections)), None))
                continue
            choices = self._choices(rule, records)
            is_ban = rule in rules.BAN_RULES
            for size in own["bans" if is_ban else "protections"]:
                chosen = rules.take(choices, size, self.layers)
                fits = size <= self.shape.num_experts - self.shape.top_k if is_ban else size < self.shape.top_k
                if not fits or not chosen:
                    continue
                found = self._try(f"{rule}/{size}", chosen if is_ban else {}, {} if is_ban else chosen)
                (bans if is_ban else protections).append(found)
        kept_bans = list(islice(self._best(bans), self.args.keep))
        kept_protections = list(islice(self._best(protections), self.args.keep))
        both = [
            self._try(f"{one['name']}+{other['name']}", one["bans"], other["protections"])
            for one in kept_bans
            for other in kept_protections
        ]
        ordered = list(self._best([*bans, *protections, *both]))
        if not ordered:
            raise RouteError(
                f"no candidate keeps the budget of {self.args.budget}: the policy would cost too much; nothing was written"
            )
        best = ordered[0]
        self._write(best, own)
        return best

    def _choices(self, rule: str, records: Sequence[Record]) -> list[rules.Choice]:
        if rule == "dataset-route":
            return rules.dataset_route(records)
        if rule in ("effect", "protect"):
            return rules.ranked(rules.presence_effect(records, self.shape), 1.0 if rule == "effect" else -1.0)
        own_routes = collect_routes(self.bench, self.items)
        own = rules.route_frequency(own_routes, self.shape)
        if rule == "lift":
            accepted = rules.accepted_frequency(records, self.shape)
            return rules.ranked({layer: accepted[layer] - own[layer] for layer in accepted})
        # Pairs: each prompt with and without the suffix that opened it; without suffixes, answered and refused prompts.
        opened = [self._with_suffix(item, key) for item in self.items for key in self._keys(item) if key in self.opening]
        others = opened or self.extra["benign"][: len(self.items)]
        answered = rules.route_frequency(collect_routes(self.bench, others), self.shape)
        return rules.ranked({layer: answered[layer] - own[layer] for layer in own})

    def _keys(self, item: Item) -> list[tuple[int, str]]:
        return [(seed, item.prompt.id) for seed in self.suffix_seeds]

    def _with_suffix(self, item: Item, key: tuple[int, str]) -> Item:
        text = " ".join([item.record.goal, *self.suffixes[key]])
        return replace(item, prompt=replace(item.prompt, token_ids=self.workspace.model.encode_chat(text)))

    def _kept(self, key: Any, make: Callable[[], R]) -> R:
        """The record under a key, made now if an earlier run did not."""
        if not self.campaign.done(key):
            self.campaign.append(key, make())
        kept: Any = next(entry.record for entry in entries(self.campaign.folder) if entry.key == key)
        return kept

    def _find_suffixes(self) -> None:
        """Suffixes on the undefended model, replayed under every candidate."""

        def find() -> Suffixes:
            words = words_of(self.workspace.model)
            tasks = [
                ((seed, item.prompt.id), attack_search("suffix", self.bench, item, seed, words=words, **self.settings))
                for seed in self.suffix_seeds
                for item in self.items
            ]
            found = dict(run_tasks(self.bench.backend, tasks))
            return Suffixes(found=tuple((*key, found[key].suffix or (), bool(found[key].success)) for key in sorted(found)))

        record = self._kept("suffixes", find)
        self.suffixes = {(seed, prompt): list(suffix) for seed, prompt, suffix, _ in record.found}
        self.opening = {(seed, prompt) for seed, prompt, _, success in record.found if success}

    def _greedy(self, own: Mapping[str, Any], protection: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Candidates of the rule greedy: the first bans of each path, by size; protected experts are left alone."""
        opened = [
            Example(self._with_suffix(item, key).prompt.token_ids, item.prompt.target)
            for item in self.items
            for key in self._keys(item)
            if key in self.opening
        ]
        if not opened:
            print("greedy: no suffix opened a prompt, so there is nothing to close", flush=True)
            return []
        answers = self._kept("answers", self._own_answers).answers
        harmless = [
            Example(item.prompt.token_ids, tuple(answers[item.prompt.id]))
            for item in [*self.extra["benign"], *self.extra["category"]]
            if answers[item.prompt.id]
        ]
        # Every additional one costs a score for each ban that is tried; the budget is measured on all of them afterwards.
        harmless = harmless[:: -(-len(harmless) // own["greedy_harmless"])] if harmless else []
        protected = protection["protections"] if protection is not None else {}
        pinned = {(layer, expert) for layer, experts in protected.items() for expert in experts}
        tried = []
        # Once with half of what the budget lets go, once with all of it: which is better is measured like everything else.
        for share in sorted({(1 + self.args.budget) / 2, self.args.budget}, reverse=True):
            settings = GreedySettings(max(own["greedy_bans"]), budget=share, utility_weight=self.args.greedy_weight)
            so_far = [msgspec.structs.asdict(record) for record in read(self.campaign.folder, Addition) if record.share == share]
            search = greedy_bans(self.bench.backend, opened, harmless, self.layers, settings, pinned, so_far)

            def note(_: Any, value: Mapping[str, Any], share: float = share) -> None:
                self.campaign.append(("greedy", share, value["number"]), msgspec.convert({**value, "share": share}, Addition))

            ((_, added),) = run_tasks(self.bench.backend, [(0, search)], note=note)
            for size in sorted({size for size in own["greedy_bans"] if size < len(added)} | {len(added)} - {0}):
                chosen = rules.take(added[:size], size, self.layers)
                tried.append(self._try(f"greedy-{share:.3g}/{size}", chosen, {}))
        return tried

    def _own_answers(self) -> OwnAnswers:
        """The undefended model's answers to harmless prompts."""

        def one(item: Item) -> Search[tuple[int, ...]]:
            model = self.workspace.model
            (response,) = yield [
                Request(item.prompt.token_ids, max_tokens=self.bench.max_new_tokens, stop_token_ids=model.stop_token_ids)
            ]
            return tuple(response.token_ids)

        items = [*self.extra["benign"], *self.extra["category"]]
        return OwnAnswers(answers=dict(run_tasks(self.bench.backend, [(item.prompt.id, one(item)) for item in items])))

    def _try(self, name: str, bans: Mapping[int, Sequence[int]], protections: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        policy = rules.combine(self.shape, bans, protections, {})
        found = self._measure(name, policy)
        print(f"{name:<28} {show(found['measured'])}{'' if self._affordable(found) else '   over budget'}", flush=True)
        return {**found, "bans": bans, "protections": protections, "policy": policy}

    def _measure(self, name: str, policy: RoutePolicy) -> dict[str, Any]:
        """Utility first: a candidate that costs too much is not attacked."""

        def make() -> Candidate:
            bench = replace(self.bench, backend=PolicyBackend(self.bench.backend, policy))
            benign, category = self.extra["benign"], self.extra["category"]
            measured = measure(bench, [], benign, category, [], [], **self.settings)
            if name == "none" or self._affordable({"measured": measured}):
                measured |= measure(bench, self.items, [], [], ["fsour-adaptive"], self.workspace.setup.seeds, **self.settings)
                if self.suffixes:
                    replayed = {"found_suffixes": self.suffixes, **self.settings}
                    measured |= measure(bench, self.items, [], [], ["suffix-transfer"], self.suffix_seeds, **replayed)
            return Candidate(
                name=name,
                policy=policy.to_dict(),
                measured={kind: round(value, 4) for kind, value in measured.items() if kind != "tokens"},
            )

        return {"name": name, "measured": self._kept(("candidate", name), make).measured}

    def _affordable(self, found: Mapping[str, Any]) -> bool:
        """Whether the harmless prompts show, with the wanted confidence, that a candidate keeps the budget."""
        measured, confidence = found["measured"], self.args.confidence
        if wilson_bound(measured["benign"], len(self.extra["benign"]), confidence) < self.args.budget:
            return False
        if not self.extra["category"]:
            return True
        most = 1 - wilson_bound(1 - measured["over_refusal"], len(self.extra["category"]), confidence)
        return most <= self.undefended.get("over_refusal", 0.0) + self.args.over_refusal

    def _best(self, candidates: Sequence[dict[str, Any]]) -> Any:
        """Affordable candidates, lowest mean attack success first; equal ones: fewer experts touched."""

        def cost(found: Mapping[str, Any]) -> tuple[float, int, str]:
            measured = found["measured"]
            attacks = [measured[name] for name in ("fsour-adaptive", "suffix-transfer") if name in measured]
            size = sum(len(experts) for part in ("bans", "protections") for experts in found[part].values())
            return sum(attacks) / len(attacks), size, found["name"]

        return iter(sorted((found for found in candidates if self._affordable(found)), key=cost))

    def _write(self, best: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        provenance = {
            "tool": "unsafe-routes derive-policy",
            "date": datetime.date.today().isoformat(),
            "rule": best["name"],
            "model": self.args.model,
            "data": self.args.data,
            "seeds": self.workspace.setup.seeds,
            "undefended": self.undefended,
            "measured": best["measured"],
            **{name: own[name] for name in ("runs", "layers", "budget", "over_refusal", "confidence", "utility")},
        }
        path = self.args.out / "policy.json"
        rules.combine(self.shape, best["bans"], best["protections"], provenance).save(path)
        print(f"\nbest: {best['name']}   {show(best['measured'])}\n{path}")
        for number in range(3):
            bans = {
                layer: rules.take(rules.random_choices(self.shape, [layer], "ban", number), len(experts), [layer])[layer]
                for layer, experts in best["bans"].items()
            }
            protections = {
                layer: rules.take(rules.random_choices(self.shape, [layer], "protect", number), len(experts), [layer])[layer]
                for layer, experts in best["protections"].items()
            }
            control = rules.combine(
                self.shape, bans, protections, {"rule": "random experts, equal size", "control_of": best["name"]}
            )
            control.save(self.args.out / f"control-{number}.json")


def show(measured: Mapping[str, float]) -> str:
    """Measurements as one line."""
    names = ("fsour-adaptive", "suffix-transfer", "benign", "over_refusal")
    return "  ".join(f"{name} {measured[name]:.2f}" for name in names if name in measured)
