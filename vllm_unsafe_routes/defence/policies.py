"""Rules that turn what a search found into a policy: which experts to disable, which to protect from exclusion.

Each rule ranks (layer, expert) pairs; how many are taken is decided by measuring (`derive.py`). Sources:

- `dataset-route`: arXiv 2602.08621: the experts of the dataset-level unsafe route in the top RoSais layers.
- `lift`: experts that are more frequent in accepted unsafe routes than in the model's own routes.
- `effect`: experts whose presence in a random mask raises the affirmative score most (from RoSais's masks and gains).
- `protect`: the reverse: experts whose absence raises it most; no request's plan may exclude them.
- `contrast`: experts that are more frequent on one side of paired prompts (as in SteerMoE): on prompts that a suffix opened than on
  the same prompts without it, or on answered prompts than on refused ones.
- `greedy`: bans added one by one, each the one that closes opened prompts best within a utility budget (`greedy.py`).
- `greedy-bias`: the same, with steps of biases beside bans.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..policy import LayerPolicy, RoutePolicy
from ..search.masks import rng_of
from ..search.rosais import share_masks
from ..shape import ModelShape
from ..study.records import Fsour, Record, Rosais

# Layer -> experts.
Experts = Mapping[int, Sequence[int]]
# Layer -> expert -> what is added to its logit.
Biases = Mapping[int, Mapping[int, float]]
# (layer, expert, step of its bias); 0: a ban.
Candidate = tuple[int, int, float]
GREEDY_RULES = ("greedy", "greedy-bias")
PROTECT_RULES = ("protect",)
BAN_RULES = ("dataset-route", "lift", "effect", "contrast", *GREEDY_RULES)
# Records that a rule reads; the others read what the deriver collects itself.
NEEDS: Mapping[str, type[Record]] = {"dataset-route": Rosais, "effect": Rosais, "protect": Rosais, "lift": Fsour}


@dataclass(frozen=True, slots=True)
class Choice:
    """One expert that a rule proposes.

    Attributes:
        layer: decoder layer.
        expert: its id.
        strength: by which the rule ranks; of no meaning across rules.
        bias: what is added to its bias; 0: it is banned.

    """

    layer: int
    expert: int
    strength: float
    bias: float = 0.0

    @classmethod
    def of(cls, candidate: Candidate, strength: float = 0.0) -> Choice:
        """The choice of a candidate."""
        layer, expert, step = candidate
        return cls(layer, expert, strength, step)

    @property
    def candidate(self) -> Candidate:
        """What is chosen."""
        return self.layer, self.expert, self.bias


def presence_effect(records: Iterable[Record], shape: ModelShape) -> dict[int, npt.NDArray[np.float64]]:
    """Per layer and expert: mean gain of the masks that leave the expert, minus that of the masks that do not.

    Args:
        records: those of RoSais among them count. Gains are centred by prompt first, so that prompts that gain much from any
            mask do not count more.
        shape: the model.

    Returns:
        layer -> float64 [num_experts], nats; NaN where an expert was in all masks or in none.

    """
    with_expert = {layer: np.zeros(shape.num_experts) for layer in shape.moe_layers}
    without = {layer: np.zeros(shape.num_experts) for layer in shape.moe_layers}
    count_with = {layer: np.zeros(shape.num_experts) for layer in shape.moe_layers}
    count = dict.fromkeys(shape.moe_layers, 0)
    total = dict.fromkeys(shape.moe_layers, 0.0)
    for record in records:
        if not isinstance(record, Rosais):
            continue
        for layer, gains in record.gains.items():
            centred = np.array(gains) - np.mean(gains)
            for mask, gain in zip(record.masks[layer], centred, strict=True):
                with_expert[layer][list(mask)] += gain
                count_with[layer][list(mask)] += 1
                total[layer] += gain
                count[layer] += 1
    effects = {}
    for layer in shape.moe_layers:
        if not count[layer]:
            continue
        without[layer] = total[layer] - with_expert[layer]
        with np.errstate(invalid="ignore", divide="ignore"):
            effects[layer] = with_expert[layer] / count_with[layer] - without[layer] / (count[layer] - count_with[layer])
    if not effects:
        raise RouteError("there are no RoSais records: derive-policy needs the folder of a rosais run for this rule")
    return effects


def accepted_frequency(records: Iterable[Record], shape: ModelShape) -> dict[int, npt.NDArray[np.float64]]:
    """Per layer: share of accepted routes of successful F-SOUR attempts that hold each expert; sums to top_k."""
    found = {layer: np.zeros(shape.num_experts) for layer in shape.moe_layers}
    number = dict.fromkeys(shape.moe_layers, 0)
    for record in records:
        if isinstance(record, Fsour) and record.success:
            for route in record.final.routes:
                found[route.layer][list(route.experts)] += 1
                number[route.layer] += 1
    if not any(number.values()):
        raise RouteError("there is no successful F-SOUR record: derive-policy needs the folder of an fsour run for this rule")
    return {layer: found[layer] / number[layer] for layer in shape.moe_layers if number[layer]}


def route_frequency(routes: Iterable[npt.NDArray[np.int32]], shape: ModelShape) -> dict[int, npt.NDArray[np.float64]]:
    """Per layer: share of tokens routed to each expert; `routes` are int [num_tokens, num_moe_layers, top_k]; sums to top_k."""
    found = np.zeros((len(shape.moe_layers), shape.num_experts))
    tokens = 0
    for ids in routes:
        tokens += len(ids)
        for slot in range(len(shape.moe_layers)):
            found[slot] += np.bincount(ids[:, slot].ravel(), minlength=shape.num_experts)
    if not tokens:
        raise RouteError("there are no routes to count")
    return {layer: found[slot] / tokens for slot, layer in enumerate(shape.moe_layers)}


def of_first_seed(records: Iterable[Record]) -> list[Rosais]:
    """The RoSais records that have the first one's seed."""
    found = [record for record in records if isinstance(record, Rosais)]
    return [record for record in found if record.seed == found[0].seed]


def dataset_route(records: Iterable[Record]) -> list[Choice]:
    """The experts of the best shared mask at each layer, layers by dataset-level RoSais.

    Raises:
        RouteError: the RoSais run did not share its masks.

    """
    found = of_first_seed(records)
    if not found:
        raise RouteError("there are no RoSais records: the rule dataset-route needs the folder of a rosais run")
    if not share_masks(found):
        raise RouteError("the rule dataset-route needs a rosais run with --same-masks")
    choices = []
    for layer, masks in found[0].masks.items():
        gains = np.mean([record.gains[layer] for record in found], axis=0)
        best = int(gains.argmax())
        choices += [Choice(layer, expert, float(gains[best])) for expert in masks[best]]
    return sorted(choices, key=lambda choice: (-choice.strength, choice.layer, choice.expert))


def ranked(values: Mapping[int, npt.NDArray[np.float64]], sign: float = 1.0) -> list[Choice]:
    """All (layer, expert) by value times `sign`, largest first; NaN left out."""
    choices = [
        Choice(layer, expert, sign * float(value))
        for layer, row in values.items()
        for expert, value in enumerate(row)
        if not np.isnan(value)
    ]
    return sorted(choices, key=lambda choice: (-choice.strength, choice.layer, choice.expert))


def random_choices(shape: ModelShape, layers: Sequence[int], *parts: str | int) -> list[Choice]:
    """Every (layer, expert) in random order."""
    order = [(layer, expert) for layer in layers for expert in range(shape.num_experts)]
    rng = rng_of("random-rule", *parts)
    rng.shuffle(order)
    return [Choice(int(layer), int(expert), 0.0) for layer, expert in order]


def random_control(policy: RoutePolicy, shape: ModelShape, number: int, control_of: str) -> RoutePolicy:
    """A policy of random experts, as many at each layer as this one disables, protects and biases, by the same values."""

    def drawn(kind: str, layer: int, size: int, others: Sequence[int] = ()) -> list[int]:
        found = [choice.expert for choice in random_choices(shape, [layer], kind, number)]
        return [expert for expert in found if expert not in others][:size]

    bans = {layer: drawn("ban", layer, len(entry.disabled)) for layer, entry in policy.layers.items()}
    protections = {layer: drawn("protect", layer, len(entry.protected)) for layer, entry in policy.layers.items()}
    biases = {
        layer: dict(zip(drawn("bias", layer, len(entry.bias), bans[layer]), entry.bias.values(), strict=False))
        for layer, entry in policy.layers.items()
    }
    return combine(shape, bans, protections, {"rule": "random experts, equal size", "control_of": control_of}, biases)


def take(choices: Sequence[Choice], per_layer: int, layers: Sequence[int]) -> dict[int, list[int]]:
    """The first `per_layer` choices of each of these layers."""
    taken: dict[int, list[int]] = {layer: [] for layer in layers}
    for choice in choices:
        if choice.layer in taken and len(taken[choice.layer]) < per_layer:
            taken[choice.layer].append(choice.expert)
    return {layer: experts for layer, experts in taken.items() if experts}


def additions(choices: Iterable[Choice]) -> tuple[dict[int, list[int]], dict[int, dict[int, float]]]:
    """Bans and biases after these steps; a banned expert has no bias."""
    bans: dict[int, list[int]] = {}
    biases: dict[int, dict[int, float]] = {}
    for choice in choices:
        if not choice.bias:
            bans.setdefault(choice.layer, []).append(choice.expert)
            biases.get(choice.layer, {}).pop(choice.expert, None)
            continue
        at = biases.setdefault(choice.layer, {})
        at[choice.expert] = at.get(choice.expert, 0.0) + choice.bias
        if not at[choice.expert]:
            del at[choice.expert]
    return bans, {layer: found for layer, found in biases.items() if found}


def combine(
    shape: ModelShape, bans: Experts, protections: Experts, provenance: Mapping[str, Any], biases: Biases = MappingProxyType({})
) -> RoutePolicy:
    """A policy of these; an expert of two kinds is banned only, and no layer keeps fewer than top_k experts."""
    layers = {}
    for layer in sorted({*bans, *protections, *biases}):
        disabled = list(bans.get(layer, ()))[: shape.num_experts - shape.top_k]
        protected = [expert for expert in protections.get(layer, ()) if expert not in disabled][: shape.top_k]
        biased = {expert: value for expert, value in biases.get(layer, {}).items() if expert not in disabled}
        layers[layer] = LayerPolicy(frozenset(disabled), frozenset(protected), biased)
    policy = RoutePolicy(layers, model=shape.fingerprint, provenance=dict(provenance))
    policy.validate(shape)
    return policy
