"""How a model of the language lab is made; no torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TUNED = ("moe", "experts", "routers", "attention")
NUM_LAYERS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EnglishSettings:
    """One model of the language lab.

    Attributes:
        seed: of the routers, the examples and the route noise.
        tune_steps: steps of safety tuning.
        forbidden: examples of a step that are refused.
        benign: examples of a step that are answered as the dense model answers them.
        category: harmless questions of a step, most of them about forbidden things.
        tune: what tuning may change: `moe` (experts and routers), `experts`, `routers`, or `attention` of all layers.
        tune_rate: peak learning rate (AdamW, cosine to zero).
        router_noise: share of sequences that are routed through random experts at each layer while tuning.
        moe_layers: decoder layers that get experts.
        num_experts: experts of a layer.
        top_k: experts of a token.
        router_std: standard deviation of the routers' weights.
        answer_tokens: so many tokens of the dense model's answers are learned. Whether to refuse shows in the first.

    Raises:
        ValueError: a value that is out of range or unknown.

    """

    seed: int = 0
    tune_steps: int = 90
    forbidden: int = 7
    benign: int = 7
    category: int = 2
    tune: str = "moe"
    tune_rate: float = 3e-4
    router_noise: float = 0.0
    moe_layers: tuple[int, ...] = tuple(range(17, NUM_LAYERS, 3))
    num_experts: int = 8
    top_k: int = 2
    router_std: float = 0.08
    answer_tokens: int = 4

    def __post_init__(self) -> None:
        if self.tune not in TUNED:
            raise ValueError(f"tune {self.tune!r} is not one of {', '.join(TUNED)}")
        if not 0 <= self.router_noise <= 1:
            raise ValueError(f"router_noise {self.router_noise} is out of range (0-1)")
        if self.tune_steps < 0:
            raise ValueError(f"tune_steps {self.tune_steps} is negative")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} is out of range (1-{self.num_experts})")
        if not self.moe_layers or not set(self.moe_layers) <= set(range(NUM_LAYERS)):
            raise ValueError(f"moe_layers {self.moe_layers} must be some of 0-{NUM_LAYERS - 1}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "moe_layers": list(self.moe_layers)}


ENGLISH_PRESETS: dict[str, EnglishSettings] = {
    "smollm2-moe": EnglishSettings(),
    "smollm2-moe-control": EnglishSettings(tune="attention", router_noise=0.5),
    "smollm2-moe-robust": EnglishSettings(router_noise=0.3),
}
