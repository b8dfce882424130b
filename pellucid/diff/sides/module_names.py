"""What transformers calls the modules of a block, and which of our tensors go in and come out."""

from __future__ import annotations

from torch import nn

# Path below a block -> name of what comes out there, or of what goes in. A norm behind attention or
# the MLP makes what is added to the stream: see `outputs`.
_OUTPUTS = {
    "input_layernorm": "attn_norm",
    "ln_1": "attn_norm",
    "self_attn": "attn_out",
    "attn": "attn_out",
    "post_attention_layernorm": "mlp_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "ln_2": "mlp_norm",
    "post_self_attn_layernorm": "attn_out",
    "post_feedforward_layernorm": "mlp_out",
    "post_mlp_layernorm": "mlp_out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.act_fn": "mlp.act",
    "mlp.c_fc": "mlp.pre",
    "mlp.fc1": "mlp.pre",
    "mlp.act": "mlp.act",
    "mlp.activation_fn": "mlp.act",
    "mlp": "mlp_out",
    "": "resid_post",
}
_INPUTS = {"": "resid_pre", "mlp.down_proj": "mlp.hidden"}
_BEHIND_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
_BEHIND_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
# Heads lie side by side in these, (B, T, heads · D).
HEADS_OUT = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
}
HEADS_IN = {
    "self_attn.o_proj": "attn.z",
    "self_attn.dense": "attn.z",
    "attn.c_proj": "attn.z",
}
HEAD_NORMS = {
    "self_attn.q_norm": "attn.q",
    "self_attn.k_norm": "attn.k",
    "self_attn.q_layernorm": "attn.q",
    "self_attn.k_layernorm": "attn.k",
    "self_attn.query_layernorm": "attn.q",
    "self_attn.key_layernorm": "attn.k",
}


def outputs(block: nn.Module) -> dict[str, str]:
    """`_OUTPUTS` for the modules that a block has.

    ``post_attention_layernorm`` stands before the MLP in most models, and behind attention where
    something else stands before the MLP (Gemma 2) or nothing does (OLMo 2).
    """
    there = {name for name, _ in block.named_children()}
    found = dict(_OUTPUTS)
    behind = _norm_behind_attention(there)
    factor = getattr(block, "residual_multiplier", 1.0) != 1.0
    if behind:
        found[behind] = "attn_out"
    if behind or factor:
        found["self_attn"] = "attn.out"
    if there & set(_BEHIND_MLP) or factor:
        found["mlp"] = "mlp.out"
    if not _gated(block):
        found["mlp.up_proj"] = "mlp.pre"
    return found


def _gated(block: nn.Module) -> bool:
    """Whether the MLP multiplies by a gate; else it is down(act(up))."""
    return submodule(block, "mlp.gate_proj") is not None


def _norm_behind_attention(there: set[str]) -> str:
    """Which child of a block normalises what attention adds to the stream, or ""."""
    if "post_self_attn_layernorm" in there:
        return "post_self_attn_layernorm"
    other = "pre_feedforward_layernorm" in there or "input_layernorm" not in there
    return "post_attention_layernorm" if other and "post_attention_layernorm" in there else ""


def inputs(block: nn.Module) -> dict[str, str]:
    """`_INPUTS`, with the place where the stream between attention and MLP is read first."""
    there = {name for name, _ in block.named_children()}
    behind = _norm_behind_attention(there)
    places = dict(_INPUTS) if _gated(block) else {**_INPUTS, "mlp.down_proj": "mlp.act"}
    before = next((name for name in _BEFORE_MLP if name in there and name != behind), "")
    if before or behind:  # else attention and MLP read the same norm: there is no stream between
        places[before or "mlp"] = "resid_mid"
    return places


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below another, None where there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
