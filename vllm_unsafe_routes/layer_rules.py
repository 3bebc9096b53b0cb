"""One (layer, position) of a plan: all its directives there together, and the row that they make under the layer's policy.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .compiled import NOT_SOFT, RowLayout, Soft, expert_bits
from .directive import Directive
from .errors import RouteError


def lowest(bits: int) -> int:
    """The smallest expert of a set."""
    return (bits & -bits).bit_length() - 1


class Place(NamedTuple):
    """A layer and where in it, for messages: a position or a span's name. A plan has many and its messages few."""

    layer: int
    where: int | str

    def __str__(self) -> str:
        return f"layer {self.layer}, " + (f"position {self.where}" if isinstance(self.where, int) else f"positions {self.where!r}")


@dataclass(slots=True)
class Gathered:
    """What directives ask of one (layer, position).

    Attributes:
        place: which.
        allowed: bits of the experts that no mask excludes.
        force: the force, or None. It decides alone: a bias, promotions and demotions beside it have no effect.
        promoted: bits of the promoted experts.
        demoted: bits of the demoted experts.
        bias: expert -> what is added to its logit, the sum of all biases.

    """

    place: Place
    allowed: int
    force: Directive | None = None
    promoted: int = 0
    demoted: int = 0
    bias: dict[int, float] = field(default_factory=dict)

    def at(self, place: Place) -> Gathered:
        """The same at another place, to be added to by itself."""
        return Gathered(place, self.allowed, self.force, self.promoted, self.demoted, dict(self.bias))

    def add(self, item: Directive) -> None:
        """One directive more. Raises `RouteError` for a second force."""
        if item.kind == "force":
            if self.force is not None:
                raise RouteError(f"{self.place}: two forces for one (layer, position)")
            self.force = item
            return
        bits = expert_bits(item.experts)
        if item.kind == "disable":
            self.allowed &= ~bits
        elif item.kind == "allow":
            self.allowed &= bits
        elif item.kind == "promote":
            self.promoted |= bits
        elif item.kind == "demote":
            self.demoted |= bits
        else:
            for expert, value in zip(item.experts, item.weights or (), strict=True):
                self.bias[expert] = self.bias.get(expert, 0.0) + value

    def soft(self) -> Soft:
        """What is asked for without excluding anything, of the experts that are left."""
        if not (self.bias or self.promoted or self.demoted):
            return NOT_SOFT
        bias = tuple((expert, value) for expert, value in sorted(self.bias.items()) if value and self.allowed >> expert & 1)
        return Soft(bias, self.promoted, self.demoted & self.allowed)


@dataclass(frozen=True, slots=True)
class LayerRules:
    """What holds at one layer, whatever a plan says.

    Attributes:
        layout: of a row.
        banned: bits of the experts that the policy disables.
        protected: bits of those that no plan may exclude.
        bias: (expert, what the policy adds to its logit), of experts that it does not ban.

    """

    layout: RowLayout
    banned: int = 0
    protected: int = 0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def all(self) -> int:
        """Bits of all experts."""
        return (1 << self.layout.num_experts) - 1

    def policy_row(self, native: bool) -> bytes | None:
        """The row of a token without a directive; None where the policy changes nothing."""
        if not self.banned and not self.bias:
            return None
        return self.layout.mask_row(self.all & ~self.banned, native, Soft(self.bias))

    def row(self, asked: Gathered, native: bool) -> bytes | None:
        """The row of what is asked, None where that is nothing.

        Raises:
            RouteError: the plan contradicts itself or the policy; begins with the place.

        """
        place = asked.place
        if asked.force is not None:
            return self._forced_row(place, asked.force, asked.allowed, native)
        soft = asked.soft()
        if asked.allowed == self.all and not soft:
            return None
        self._check_protected(place, asked.allowed)
        left, top_k = asked.allowed & ~self.banned, self.layout.top_k
        if left.bit_count() < top_k:
            # Enough for a plan alone: then it is the policy that takes the rest away.
            reason = "policy" if asked.allowed.bit_count() >= top_k else "invalid"
            raise RouteError(f"{place}: {left.bit_count()} experts left, top_k {top_k} are needed", reason)
        self._check_soft(asked, soft)
        return self.layout.mask_row(left, native, self._with_bias(soft, left))

    def _forced_row(self, place: Place, force: Directive, allowed: int, native: bool) -> bytes:
        chosen = expert_bits(force.experts)
        if chosen & ~allowed:
            raise RouteError(f"{place}: expert {lowest(chosen & ~allowed)} is forced and disabled by the same plan")
        if chosen & self.banned:
            raise RouteError(
                f"{place}: expert {lowest(chosen & self.banned)} is disabled by the engine's policy and cannot be forced", "policy"
            )
        self._check_protected(place, chosen)
        return self.layout.forced_row(force.experts, force.weights, native, chosen)

    def _check_protected(self, place: Place, chosen: int) -> None:
        if self.protected & ~chosen:
            raise RouteError(
                f"{place}: expert {lowest(self.protected & ~chosen)} is protected by the engine's policy and cannot be excluded",
                "policy",
            )

    def _with_bias(self, soft: Soft, left: int) -> Soft:
        """What a plan asks with the policy's bias added to its own; a plan may outweigh it, but not be rid of it by being there."""
        if not self.bias:
            return soft
        total = dict(soft.bias)
        for expert, value in self.bias:
            total[expert] = total.get(expert, 0.0) + value
        bias = tuple((expert, value) for expert, value in sorted(total.items()) if value and left >> expert & 1)
        return Soft(bias, soft.promoted, soft.demoted)

    def _check_soft(self, asked: Gathered, soft: Soft) -> None:
        if not soft:
            return
        place = asked.place
        if soft.promoted & asked.demoted:
            raise RouteError(f"{place}: expert {lowest(soft.promoted & asked.demoted)} is promoted and demoted by the same plan")
        if soft.promoted & ~asked.allowed:
            raise RouteError(f"{place}: expert {lowest(soft.promoted & ~asked.allowed)} is promoted and disabled by the same plan")
        if soft.promoted & self.banned:
            raise RouteError(
                f"{place}: expert {lowest(soft.promoted & self.banned)} is disabled by the engine's policy and cannot be promoted",
                "policy",
            )
        if soft.promoted.bit_count() >= self.layout.top_k:
            raise RouteError(
                f"{place}: {soft.promoted.bit_count()} promoted experts, fewer than top_k {self.layout.top_k} can be; use force"
            )
        if not self.protected:
            return
        lowered = soft.demoted | expert_bits(expert for expert, value in soft.bias if value < 0)
        if lowered & self.protected:
            raise RouteError(
                f"{place}: expert {lowest(lowered & self.protected)} is protected by the engine's policy and cannot be demoted",
                "policy",
            )
        # Whoever is raised may push another one out.
        for expert in range(self.layout.num_experts):
            raised = soft.promoted >> expert & 1 or dict(soft.bias).get(expert, 0.0) > 0
            others = self.protected & ~(1 << expert)
            if raised and others:
                raise RouteError(
                    f"{place}: expert {lowest(others)} is protected by the engine's policy, and expert {expert} cannot be raised "
                    "above it",
                    "policy",
                )
