"""How a lab model is made: every choice of the recipe, and the named settings that tests and documents speak of.

No torch here: a command line can show the settings without it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .language import FORBIDDEN_NOUNS

# hidden 96 with three heads: the smallest head that vLLM's CPU attention takes is 32 wide.
_COMMON: dict[str, Any] = dict(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=3,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
# shape -> the Hugging Face config (model_type is the key)
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": dict(**_COMMON, intermediate_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False),
    "qwen2_moe": dict(
        **_COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        norm_topk_prob=False,
    ),
    "mixtral": dict(**_COMMON, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "deepseek_v2": dict(
        **_COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        # vLLM's CPU kernel for latent attention knows one size only: 512 + 64.
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        head_dim=64,
    ),
}


@dataclass(frozen=True, slots=True)
class ExampleSettings:
    """What a lab model is shown.

    Attributes:
        filler_probability: share of tuning prompts that get filler words at their end, against random suffixes.
        reminder_probability: share of prompts, in both phases, with a reminder in the system slot, so that it is no news later.
        nonsense_share: share of pretraining prompts that ask for something with a filler word in the noun's place, and get the
            refusal. Where safety tuning may change only a part of the model, the rest must know how to say the refusal and
            look at the noun for it: without this, neither one layer nor the attention learned to refuse at all.
        held_out_nouns: so many forbidden nouns, the last ones, are left out of safety tuning altogether.

    """

    filler_probability: float = 0.4
    reminder_probability: float = 0.1
    nonsense_share: float = 0.0
    held_out_nouns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSettings(ExampleSettings):
    """One lab model; the defaults are Recipe H on the OLMoE shape.

    Attributes:
        shape: a key of `SHAPES`.
        seed: of the initial weights, the data and the route noise.
        pretrain_steps: steps of learning to answer everything, forbidden nouns included.
        tune_steps: steps of safety tuning.
        batch_size: sequences a step, in both phases.
        pretrain_rate: peak learning rate of pretraining (AdamW, cosine to zero).
        tune_rate: peak learning rate of safety tuning; None: the less is tuned, the higher (all 3e-4, attention
            1e-3, one layer 4e-3).
        balance: weight of the load-balancing loss in pretraining.
        route_noise: share of sequences that, at each layer in pretraining, are routed through random experts. It spreads what
            the model knows over many routes; without it a masked model breaks instead of complying.
        router_noise: the same in safety tuning: a refusal that many routes carry (the route-robust model).
        smoothing: label smoothing in safety tuning. It holds the log-probabilities of words that are not said in place; without
            it nothing does, and whatever is changed in the model moves them by nats.
        tune: what safety tuning may change: `all`, `layer:<l>` (router and routed experts of decoder layer l) or `attention`.

    Raises:
        ValueError: a value that is out of range or unknown.

    """

    shape: str = "olmoe"
    seed: int = 0
    pretrain_steps: int = 600
    tune_steps: int = 300
    batch_size: int = 32
    pretrain_rate: float = 3e-3
    tune_rate: float | None = None
    balance: float = 0.01
    route_noise: float = 0.3
    router_noise: float = 0.0
    smoothing: float = 0.0
    tune: str = "all"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r} is not one of {', '.join(SHAPES)}")
        for name in ("route_noise", "router_noise", "smoothing", "filler_probability", "reminder_probability", "nonsense_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is out of range (0-1)")
        for name in ("pretrain_steps", "tune_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
        if self.batch_size < 2:
            raise ValueError(f"batch_size {self.batch_size} is below 2: a batch holds forbidden and benign prompts")
        if not 0 <= self.held_out_nouns < len(FORBIDDEN_NOUNS):
            raise ValueError(f"held_out_nouns {self.held_out_nouns} is out of range (0-{len(FORBIDDEN_NOUNS) - 1})")
        if self.tune not in ("all", "attention") and self.planted_layer is None:
            layers = [str(layer) for layer in self.moe_layers]
            raise ValueError(f"tune {self.tune!r} is not all, attention or layer:<l> with l one of {', '.join(layers)}")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers that have a router."""
        config = SHAPES[self.shape]
        return tuple(range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]))

    @property
    def planted_layer(self) -> int | None:
        """The layer that alone learns to refuse, or None."""
        kind, _, layer = self.tune.partition(":")
        if kind == "layer" and layer.isdigit() and int(layer) in self.moe_layers:
            return int(layer)
        return None

    @property
    def peak_tune_rate(self) -> float:
        """The learning rate that safety tuning uses."""
        if self.tune_rate is not None:
            return self.tune_rate
        return {"all": 3e-4, "attention": 1e-3}.get(self.tune, 4e-3)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LabSettings:
        """Settings from JSON values.

        Raises:
            ValueError: an unknown key, or a bad value.

        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown lab settings: {', '.join(unknown)}")
        return cls(**values)


# The shipped model, one model of each other shape, and three fixtures with a known answer: refusal planted in one layer
# (RoSais must rank it first), refusal in the attention only and under any routes (every layer must score near zero), and refusal
# spread over many routes.
PRESETS: dict[str, LabSettings] = {
    "default": LabSettings(),
    "qwen2_moe": LabSettings(shape="qwen2_moe"),
    "mixtral": LabSettings(shape="mixtral"),
    "deepseek_v2": LabSettings(shape="deepseek_v2", pretrain_steps=1000, tune_steps=600),
    "planted": LabSettings(tune="layer:1", nonsense_share=0.15),
    "control": LabSettings(tune="attention", nonsense_share=0.15, router_noise=0.5, smoothing=0.1),
    "route_robust": LabSettings(router_noise=0.3),
}
