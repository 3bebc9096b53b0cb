"""A small config for every MoE architecture that vLLM registers.

Most are the defaults of the family's own config class, cut to a few layers: on the meta device width costs nothing. What the
defaults leave out is added here. Families whose config class is code in the checkpoint have a config written by hand.
"""

from __future__ import annotations

from typing import Any

NUM_LAYERS = 4
# Key of a part that starts from the defaults of the config class of this model type.
FROM_CLASS = "from_class"

_LATENT = dict(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_TEXT = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    num_experts_per_tok=4,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
_BAILING = {
    **_TEXT,
    "num_experts": 16,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "rope_scaling": None,
    "embedding_dropout": 0.0,
}
_PANGU = {
    **_TEXT,
    **_LATENT,
    "q_lora_rank": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "router_enable_expert_bias": True,
    "sandwich_norm": True,
}
_GEMMA4 = dict(enable_moe_block=True, num_experts=16, top_k_experts=4, moe_intermediate_size=128, per_layer_config=None)
_INKLING = dict(
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, dense_mlp_idx=1, use_gate_bias=True, shared_expert_sink=True
)
_KIMI_LINEAR = dict(
    **_LATENT,
    hidden_size=1024,
    num_attention_heads=8,
    moe_intermediate_size=128,
    num_experts=16,
    num_experts_per_token=4,
    num_shared_experts=1,
    first_k_dense_replace=1,
    mla_use_nope=True,
    linear_attn_config=dict(
        kda_layers=[1, 2, 3], full_attn_layers=[4], head_dim=128, num_heads=8, short_conv_kernel_size=4, use_full_rank_gate=False
    ),
)
_LONGCAT = dict(
    num_layers=2,
    moe_intermediate_size=128,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
    zero_expert_type="identity",
    router_bias=False,
)
_MIMO = dict(
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    moe_layer_freq=[0, 1, 1, 1],
    hybrid_layer_pattern=[0, 1, 1, 0],
    layernorm_epsilon=1e-5,
    attention_bias=False,
    sliding_window=128,
    sliding_window_size=128,
    swa_head_dim=64,
    swa_num_attention_heads=8,
    swa_num_key_value_heads=2,
    swa_rope_theta=10000.0,
    v_head_dim=64,
    add_swa_attention_sink_bias=True,
    add_full_attention_sink_bias=False,
)
_DEEPSEEK_V2 = {
    **_TEXT,
    **_LATENT,
    "model_type": "deepseek_v2",
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
# The OCR models' text part has plain attention.
_DEEPSEEK_OCR = {**_DEEPSEEK_V2, "use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0}
_MOONDREAM = {"config": {"text": {"n_layers": NUM_LAYERS, "moe": {"start_layer": 1}}, "vision": {"enc_n_layers": 2}}}
_GLM5_NEXT = dict(mhc=False, mla_use_nope=True, indexer_rope_interleave=True, topk_method="noaux_tc", scoring_func="sigmoid")
_STEP5 = dict(
    num_attention_heads=32,
    head_dim=128,
    use_moe=True,
    moe_layers_enum="1,2,3",
    sparse_config=dict(index_tp_size=8),
    layer_types=["full_attention"] * NUM_LAYERS,
    use_moe_router_bias=True,
)
_GROUPS = dict(n_group=4, topk_group=2)

# Architecture -> model type, what is added to the defaults of its config class.
BY_CLASS: dict[str, tuple[str, dict[str, Any]]] = {
    "AfmoeForCausalLM": ("afmoe", dict(score_func="sigmoid", route_norm=True, n_group=1, topk_group=1)),
    "AXK1ForCausalLM": ("axk1", {}),
    "AriaForConditionalGeneration": ("aria", {}),
    "BailingMoeV3VLForConditionalGeneration": (
        "bailing_moe_v3_vl",
        {"text_config": dict(layer_group_size=2, layer_types=None, layers_block_type=None, no_kda_lora=True)},
    ),
    "BeamForCausalLM": ("beam", {}),
    "Cohere2MoeForCausalLM": ("cohere2_moe", {}),
    "DeepseekV2ForCausalLM": ("deepseek_v2", dict(_GROUPS, num_experts_per_tok=4)),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {}),
    "DeepseekV32ForCausalLM": ("deepseek_v32", dict(index_topk=2048, index_n_heads=64, index_head_dim=128)),
    "DeepseekV4ForCausalLM": ("deepseek_v4", {}),
    "DeepseekV4ForConditionalGeneration": (
        "deepseek_v4",
        dict(
            vision_n_layers=1,
            vision_dim=1024,
            vision_n_heads=16,
            vision_inter_dim=2816,
            vision_patch_size=14,
            vision_rope_theta=10000.0,
            vision_downsample_ratio=3,
            vision_max_n_token=1024,
            vision_min_pixels=295936,
            vision_max_wh_ratio=None,
        ),
    ),
    "DeepseekV41ForCausalLM": ("deepseek_v41", {"text_config": {FROM_CLASS: "deepseek_v4", "mlp_layer_types": None}}),
    "Ernie4_5_MoeForCausalLM": ("ernie4_5_moe", {}),
    "Ernie4_5_VLMoeForConditionalGeneration": (
        "ernie4_5_vl_moe",
        {"pixel_hidden_size": 1280, "vision_config": dict(embed_dim=1280, mlp_ratio=4)},
    ),
    "ExaoneMoeForCausalLM": ("exaone_moe", {}),
    "ExaoneMoEForCausalLM": ("exaone_moe", {}),
    "FlexOlmoForCausalLM": ("flex_olmo", {}),
    "FlintForCausalLM": ("flint", {}),
    "Gemma4ForCausalLM": ("gemma4_text", _GEMMA4),
    "Gemma4ForConditionalGeneration": ("gemma4", {"text_config": _GEMMA4, "vision_config": {}}),
    "Gemma4UnifiedForConditionalGeneration": ("gemma4_unified", {"text_config": _GEMMA4, "vision_config": {}}),
    "DiffusionGemmaForBlockDiffusion": ("diffusion_gemma", {"text_config": _GEMMA4}),
    "Glm4MoeForCausalLM": ("glm4_moe", dict(head_dim=128)),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", dict(first_k_dense_replace=1)),
    "Glm4vMoeForConditionalGeneration": ("glm4v_moe", {"text_config": dict(head_dim=128, use_qk_norm=False)}),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa", {}),
    "Glm5NextForCausalLM": (
        "glm5_next_text",
        _GLM5_NEXT,
    ),
    "Glm5NextForConditionalGeneration": (
        "glm5_next",
        {"text_config": _GLM5_NEXT},
    ),
    "GptOssForCausalLM": ("gpt_oss", {}),
    "GraniteMoeForCausalLM": ("granitemoe", {}),
    "GraniteMoeHybridForCausalLM": ("granitemoehybrid", {}),
    "GraniteMoeSharedForCausalLM": ("granitemoeshared", {}),
    "GraniteMoeSWAForCausalLM": ("granitemoe_swa", {}),
    "HYV3ForCausalLM": (
        "hy_v3",
        dict(first_k_dense_replace=1, expert_hidden_dim=128, route_norm=True, moe_router_use_sigmoid=True),
    ),
    "HYV4ForCausalLM": ("hy_v4", {}),
    "HunYuanMoEV1ForCausalLM": ("hunyuan_v1_moe", dict(head_dim=128, num_key_value_heads=8, num_experts=16, moe_topk=4)),
    "InklingForCausalLM": ("inkling_model", _INKLING),
    "InklingForConditionalGeneration": ("inkling_mm_model", {"text_config": _INKLING}),
    "JambaForCausalLM": ("jamba", {}),
    "JambaForSequenceClassification": ("jamba", {}),
    "KimiK25ForConditionalGeneration": ("kimi_k25", {}),
    "KimiK3ForConditionalGeneration": ("kimi_k3", {"text_config": _KIMI_LINEAR}),
    "KimiLinearForCausalLM": ("kimi_linear", _KIMI_LINEAR),
    "KimiVLForConditionalGeneration": ("kimi_vl", {"text_config": dict(_GROUPS, num_experts_per_tok=4)}),
    "LagunaForCausalLM": ("laguna", {}),
    "Lfm2MoeForCausalLM": ("lfm2_moe", dict(layer_types=["conv", "conv", "full_attention", "conv"])),
    "Llama4ForCausalLM": ("llama4_text", {}),
    "Llama4ForConditionalGeneration": ("llama4", {}),
    "LongcatFlashForCausalLM": ("longcat_flash", _LONGCAT),
    "LongcatFlashNgramForCausalLM": ("longcat_flash", _LONGCAT),
    "MellumForCausalLM": ("mellum", {}),
    "MiMoV2FlashForCausalLM": ("mimo_v2_flash", _MIMO),
    "MiniMaxM2ForCausalLM": ("minimax_m2", dict(rotary_dim=64, scoring_func="sigmoid", use_routing_bias=True)),
    "MiniMaxM3SparseForCausalLM": (
        "minimax_m3_vl",
        {"vision_config": {FROM_CLASS: "clip_vision_model", "img_token_compression_config": {}}},
    ),
    "MiniMaxM3SparseForConditionalGeneration": (
        "minimax_m3_vl",
        {"vision_config": {FROM_CLASS: "clip_vision_model", "img_token_compression_config": {}}},
    ),
    "MistralLarge3ForCausalLM": ("deepseek_v3", {}),
    "DeepseekV3BidirectionalModel": ("deepseek_v3", {}),
    "MixtralForCausalLM": ("mixtral", {}),
    "NemotronHForCausalLM": ("nemotron_h", {}),
    "NemotronHPuzzleForCausalLM": ("nemotron_h", {}),
    "OlmoeForCausalLM": ("olmoe", {}),
    "OpenAIPrivacyFilterForTokenClassification": ("openai_privacy_filter", {}),
    "PhiMoEForCausalLM": ("phimoe", {}),
    "PhimoeForCausalLM": ("phimoe", {}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {}),
    "Qwen3NextForCausalLM": ("qwen3_next", {}),
    "Qwen3OmniMoeForConditionalGeneration": (
        "qwen3_omni_moe",
        {
            "thinker_config": {
                "text_config": dict(tie_word_embeddings=False),
                "vision_config": dict(image_size=768, apply_vit_abs_pos_embed=True),
            }
        },
    ),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", {"text_config": dict(norm_topk_prob=True)}),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", {}),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", {}),
    "Qwen4ExpForCausalLM": ("qwen4_exp_text", dict(output_gate_type="silu")),
    "Qwen4ExpForConditionalGeneration": (
        "qwen4_exp",
        {"text_config": dict(output_gate_type="silu"), "vision_config": dict(deepstack_visual_indexes=[])},
    ),
    "Step3TextForCausalLM": ("step3_text", dict(moe_layers_enum="1,2,3")),
    "Step3VLForConditionalGeneration": (
        "step3_vl",
        {"text_config": dict(moe_layers_enum="1,2,3", architectures=["Step3TextForCausalLM"])},
    ),
    "Step3p5ForCausalLM": ("step3p5", dict(use_moe_router_bias=True, need_fp32_gate=True, norm_expert_weight=True)),
    "Step3p7ForConditionalGeneration": (
        "step3p7",
        {
            "vision_config": dict(output_dim=None),
            "text_config": dict(use_moe_router_bias=True, need_fp32_gate=True, norm_expert_weight=True),
        },
    ),
    "Step5ForCausalLM": ("step5", _STEP5),
    "Step5ForConditionalGeneration": ("step5_vl", {"text_config": dict(_STEP5, architectures=["Step5ForCausalLM"])}),
    "Dots3NoteForCausalLM": ("dots3_note", {}),
}

# Architecture -> model type, the whole config.
BY_HAND: dict[str, tuple[str, dict[str, Any]]] = {
    "BailingMoeForCausalLM": ("bailing_moe", _BAILING),
    "BailingMoeV2ForCausalLM": ("bailing_moe_v2", _BAILING),
    "BailingMoeV2_5ForCausalLM": ("bailing_hybrid", {**_BAILING, **_LATENT, "layer_group_size": 2}),
    "BailingMoeV3ForCausalLM": (
        "bailing_moe_v3",
        {**_BAILING, **_LATENT, "layer_group_size": 2, "short_conv_kernel_size": 4, "no_kda_lora": True},
    ),
    "DbrxForCausalLM": (
        "dbrx",
        {
            "d_model": 256,
            "n_heads": 8,
            "n_layers": NUM_LAYERS,
            "max_seq_len": 4096,
            "vocab_size": 1024,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000.0},
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 16, "moe_top_k": 4},
        },
    ),
    "DeepseekVLV2ForCausalLM": ("deepseek_vl_v2", {"tile_tag": "2D", "language_config": _DEEPSEEK_V2}),
    "DeepseekOCRForCausalLM": ("deepseek_vl_v2", {"tile_tag": "2D", "language_config": _DEEPSEEK_OCR}),
    "DeepseekOCR2ForCausalLM": ("deepseek_vl_v2", {"tile_tag": "2D", "language_config": _DEEPSEEK_OCR}),
    "UnlimitedOCRForCausalLM": ("unlimited-ocr", {"tile_tag": "2D", "language_config": _DEEPSEEK_OCR}),
    "DeepseekForCausalLM": (
        "deepseek",
        {**_TEXT, "n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1},
    ),
    "K2HorizonForCausalLM": (
        "k2_horizon",
        {
            **_TEXT,
            "num_experts": 16,
            "num_shared_experts": 1,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "attention_bias": False,
            "attention_gate_func": "sigmoid",
            "layernorm_num_groups": 1,
            "moe_gate_bias": True,
            "mova_num_experts": 4,
            "mova_num_experts_per_tok": 2,
            "query_key_norm": True,
            "rope_head_dim": 64,
            "router_scaling_factor": 1.0,
            "router_score_func": "sigmoid",
        },
    ),
    "MiMoV2ForCausalLM": ("mimo_v2", {**_TEXT, **_MIMO}),
    "Moondream3ForCausalLM": ("moondream3", _MOONDREAM),
    "HfMoondream": ("moondream3", _MOONDREAM),
    "MuseSparkForConditionalGeneration": (
        "muse_spark",
        {
            "text_config": {FROM_CLASS: "muse_spark_text", "hidden_act": "silu"},
            "vision_config": {FROM_CLASS: "muse_spark_vision"},
            "audio_config": {FROM_CLASS: "muse_spark_audio"},
            "projector_hidden_size": 1024,
            "out_hidden_size": 4096,
        },
    ),
    "PanguProMoEV2ForCausalLM": ("pangu_pro_moe_v2", _PANGU),
    "PanguUltraMoEForCausalLM": ("pangu_ultra_moe", _PANGU),
    "Param2MoEForCausalLM": ("param2moe", _BAILING),
    "SarvamMoEForCausalLM": ("sarvam_moe", _BAILING),
    "SarvamMLAForCausalLM": ("sarvam_mla", {**_BAILING, **_LATENT}),
}

# MoE by their source; their config classes are neither in transformers nor in vLLM, and nobody has written one here.
WITHOUT_CONFIG = frozenset(
    {
        "AliceAIForCausalLM",
        "InternS1ProForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "Kolibri1ForCausalLM",
        "MiMoV2OmniForCausalLM",
        "NemotronH_Nano_Omni_Reasoning_V3",
        "NemotronH_Nano_VL_V2",
        "NemotronH_Omni_Reasoning_V3",
        "NemotronH_Super_Omni_Reasoning_V3",
        "Ovis2_6_MoeForCausalLM",
    }
)
# Import a module that builds MoE layers, and build none: dense members of a family, encoders, rerankers on a dense backbone.
DENSE = frozenset(
    {
        "BgeM3EmbeddingModel",
        "ClefFlashForJointSchema",
        "ClefOmniForJointSchema",
        "ColBERTJinaRobertaModel",
        "ColBERTLfm2Model",
        "ColBERTModernBertModel",
        "ColQwen3_5",
        "Cosmos3EdgeForConditionalGeneration",
        "D3ForSequenceClassification",
        "EmbeddingGemma2Model",
        "GteModel",
        "GteNewForSequenceClassification",
        "GteNewModel",
        "HF_ColBERT",
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "NomicBertModel",
        "PanguEmbeddedForCausalLM",
        "Qwen3ASRForConditionalGeneration",
        "Qwen3ASRForcedAlignerForTokenClassification",
        "Qwen3ASRRealtimeGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaModel",
        "XLMRobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
        "XLMRobertaModel",
    }
)


def overlay(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` put over it, sub-configs key by key."""
    merged = dict(base)
    for key, value in extra.items():
        inner = merged.get(key)
        merged[key] = overlay(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def shortened(config: dict[str, Any]) -> dict[str, Any]:
    """A config cut to `NUM_LAYERS` layers, lists with an entry a layer included, in every part."""
    config = {key: shortened(value) if isinstance(value, dict) else value for key, value in config.items()}
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > NUM_LAYERS:
        for key, value in config.items():
            if isinstance(value, list) and len(value) >= layers:
                config[key] = value[:NUM_LAYERS]
        config["num_hidden_layers"] = NUM_LAYERS
    return config
