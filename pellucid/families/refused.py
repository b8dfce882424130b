"""Families that need more than the decoder has, and what that is."""

from __future__ import annotations

_EXPERTS = "experts (an MLP chosen per token)"
_LATENT = "latent attention (keys and values packed into one vector per token)"
_STATE = "state-space layers beside attention (Mamba)"
_DELTA = "gated delta-rule layers beside attention"
_SHARED = "embeddings per layer and keys and values shared between layers"

MISSING: dict[str, str] = {
    **dict.fromkeys(
        (
            "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe", "granitemoe",
            "granitemoeshared", "dbrx", "jetmoe", "llama4", "llama4_text", "glm4_moe",
            "ernie4_5_moe", "dots1", "hunyuan_v1_moe", "minimax", "flex_olmo", "afmoe",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "youtu",
            "longcat_flash", "glm4_moe_lite", "glm_moe_dsa",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            "mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba", "zamba", "zamba2",
            "nemotron_h", "granitemoehybrid",
        ),
        _STATE,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "olmo_hybrid"), _DELTA),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _SHARED),
    **dict.fromkeys(("bloom", "mpt", "falcon"), "scores that fall with distance (ALiBi)"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "short convolutions beside attention"),
    "recurrent_gemma": "linear recurrences beside attention",
    "apertus": "an activation with learned parameters (xIELU)",
    "rwkv": "a recurrence instead of attention",
}  # fmt: skip
