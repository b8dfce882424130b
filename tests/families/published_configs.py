"""config.json of well-known models as published: the keys that state arithmetic, and some that do
not, and how many parameters the model has by its files.
"""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "initializer_range": 0.02, "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
_OLDER = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama", "pad_token_id": 0,
    "pretraining_tp": 1, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False,
}  # fmt: skip


def _sizes(width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
    }


# Name on the Hub -> (config.json, parameters)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        {
            **_LLAMA,
            **_sizes(4096, 32, 32, 8, 14336),
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "meta-llama/Llama-3.2-1B": (
        {
            **_LLAMA,
            **_sizes(2048, 16, 32, 8, 8192),
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "lmsys/vicuna-7b-v1.5-16k": (
        {
            **_OLDER,
            **_sizes(4096, 32, 32, 32, 11008),
            "_name_or_path": "vicuna-7b-v1.5-16k",
            "max_position_embeddings": 4096,
            "max_sequence_length": 16384,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    "upstage/SOLAR-0-70b-16bit": (
        {
            **_OLDER,
            **_sizes(8192, 80, 64, 8, 28672),
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "vocab_size": 32000,
        },
        68_976_648_192,
    ),
    "Qwen/Qwen2.5-7B-Instruct with yarn": (  # as its model card says for long texts
        {
            **_QWEN,
            **_sizes(3584, 28, 28, 4, 18944),
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "rope_scaling": {
                "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"
            },
            "sliding_window": 131072,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen/Qwen3-8B": (
        {
            **_QWEN,
            **_sizes(4096, 36, 32, 8, 12288),
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "rope_scaling": None,
            "sliding_window": None,
            "vocab_size": 151936,
        },
        8_190_735_360,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {
            **_sizes(4096, 32, 32, 8, 14336),
            "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
            "max_position_embeddings": 32768, "model_type": "mistral", "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32768,
        },
        7_248_023_552,
    ),
    "google/gemma-2-9b": (
        {
            **_sizes(3584, 42, 16, 8, 14336),
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
            "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
            "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
            "max_position_embeddings": 8192, "model_type": "gemma2", "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
            "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
            "use_cache": True, "vocab_size": 256000,
        },
        9_241_705_984,
    ),
    "google/gemma-3-4b-it": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
            "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
            "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {
                "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                "model_type": "siglip_vision_model", "num_attention_heads": 16,
                "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
            },
        },
        3_880_263_168,  # of the text part
    ),
    "microsoft/Phi-3-mini-128k-instruct": (
        {
            **_sizes(3072, 32, 32, 32, 8192),
            "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
            "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072,
            "model_type": "phi3", "original_max_position_embeddings": 4096, "pad_token_id": 32000,
            "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            # 48 factors each, here in steps
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.04 * pair for pair in range(48)],
                "long_factor": [1.08 + 1.3 * pair for pair in range(48)],
            },
            "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "use_cache": True, "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {
            **_sizes(2048, 36, 16, 4, 11008),
            "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 128012,
            "hidden_act": "silu", "initializer_range": 0.02, "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
            "model_type": "smollm3", "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9, "pad_token_id": 128004,
            "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
            "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
        },
        3_075_098_624,
    ),
    "allenai/OLMo-2-1124-7B": (
        {
            **_sizes(4096, 32, 32, 32, 11008),
            "architectures": ["Olmo2ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu",
            "initializer_range": 0.02, "max_position_embeddings": 4096, "model_type": "olmo2",
            "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
            "use_cache": True, "vocab_size": 100352,
        },
        7_298_617_344,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        {
            **_sizes(4096, 40, 32, 8, 12800),
            "architectures": ["GraniteForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "bos_token_id": 0,
            "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu",
            "initializer_range": 0.02, "logits_scaling": 16.0, "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "granite", "pad_token_id": 0,
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "use_cache": True, "vocab_size": 49159,
        },
        8_170_864_640,
    ),
    "CohereForAI/c4ai-command-r-plus": (
        {
            **_sizes(12288, 64, 96, 8, 33792),
            "architectures": ["CohereForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id": 255001,
            "hidden_act": "silu", "initializer_range": 0.02, "layer_norm_eps": 1e-05,
            "logit_scale": 0.8333333333333334, "max_position_embeddings": 8192,
            "model_max_length": 131072, "model_type": "cohere", "pad_token_id": 0,
            "rope_theta": 75000000.0, "torch_dtype": "float16", "use_cache": True,
            "use_qk_norm": True, "vocab_size": 256000,
        },
        103_810_674_688,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {
            **_QWEN,
            **_sizes(896, 24, 14, 2, 4864),
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "google/gemma-3-1b-it": (
        {
            **_sizes(1152, 26, 4, 1, 6912),
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
            "cache_implementation": "hybrid", "eos_token_id": [1, 106],
            "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
            "max_position_embeddings": 32768, "model_type": "gemma3_text", "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True,
            "vocab_size": 262144,
        },
        999_885_952,
    ),
    "microsoft/Phi-4-mini-instruct": (
        {
            **_sizes(3072, 32, 24, 8, 8192),
            "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 199999, "embd_pdrop": 0.0,
            "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
            "initializer_range": 0.02, "interpolate_factor": 1, "lm_head_bias": False,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
            "original_max_position_embeddings": 4096, "pad_token_id": 199999,
            "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + pair for pair in range(48)],
            },
            "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 200064,
        },
        3_836_021_760,
    ),
    "allenai/Olmo-3-7B-Instruct": (
        {
            **_sizes(4096, 32, 32, 32, 11008),
            "architectures": ["Olmo3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": None, "dtype": "bfloat16",
            "eos_token_id": 100257, "hidden_act": "silu", "initializer_range": 0.02,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
            "max_position_embeddings": 65536, "model_type": "olmo3", "pad_token_id": 100277,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
                "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
            "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
            "transformers_version": "4.57.0", "use_cache": False, "vocab_size": 100278,
        },
        7_298_011_136,
    ),
    "stabilityai/stablelm-2-12b": (
        {
            **_sizes(5120, 40, 32, 8, 13824),
            "architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": 100257, "eos_token_id": 100257, "hidden_act": "silu",
            "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 4096, "model_type": "stablelm",
            "partial_rotary_factor": 0.25, "qk_layernorm": True, "rope_scaling": None,
            "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "use_cache": True, "use_parallel_residual": True, "use_qkv_bias": False,
            "vocab_size": 100352,
        },
        12_143_185_920,
    ),
}  # fmt: skip
