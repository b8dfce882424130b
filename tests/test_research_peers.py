"""The tasks of the cookbook against TransformerLens 2: `pip install "transformer_lens<3"`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import pellucid
from pellucid.evaluate.heads import head_scores, repeated_random_tokens

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
CLEAN = "When Leo and Ruth went to the store, Leo gave a drink to"
CORRUPTED = "When Leo and Ruth went to the store, Ruth gave a drink to"
RIGHT, WRONG = " Ruth", " Leo"


@pytest.fixture(scope="module")
def lm() -> pellucid.LanguageModel:
    return pellucid.load("demo-gpt2", dtype="float32")


@pytest.fixture(scope="module")
def hooked(lm: pellucid.LanguageModel) -> Any:
    """TransformerLens's model with the same weights, norms folded into what follows them."""
    lens = pytest.importorskip("transformer_lens")
    c = lm.model.config
    model = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            d_model=c.width,
            d_head=c.head_dim,
            n_heads=c.n_heads,
            n_layers=c.n_layers,
            d_mlp=c.hidden_width,
            n_ctx=c.context_length,
            d_vocab=c.vocab_size,
            act_fn="gelu_new",
            eps=c.norm_eps,
            normalization_type="LN",
            device="cpu",
            use_attn_result=True,
        )
    )
    ours, theirs = dict(lm.model.named_parameters()), model.state_dict()
    theirs["embed.W_E"] = ours["embed.weight"]
    theirs["pos_embed.W_pos"] = ours["pos_embed.weight"]
    theirs["unembed.W_U"] = ours["embed.weight"].T
    for end in ("weight", "bias"):
        theirs[f"ln_final.{end[0]}"] = ours[f"norm.{end}"]
        for layer in range(c.n_layers):
            there = partial("blocks.{}.{}".format, layer)
            here = partial("layers.{}.{}.{}".format, layer)
            theirs[there(f"ln1.{end[0]}")] = ours[here("attn_norm", end)]
            theirs[there(f"ln2.{end[0]}")] = ours[here("mlp_norm", end)]
            kind = "W" if end == "weight" else "b"
            for name in "qkvo":
                value = ours[here(f"attn.{name}_proj", end)]
                if end == "weight":
                    shape = (c.width, c.n_heads, c.head_dim)
                    split = value.T.reshape(shape).transpose(0, 1)
                    value = value.T.reshape(c.n_heads, c.head_dim, -1) if name == "o" else split
                elif name != "o":
                    value = value.reshape(c.n_heads, c.head_dim)
                theirs[there(f"attn.{kind}_{name.upper()}")] = value
            for name, place in (("up_proj", "in"), ("down_proj", "out")):
                theirs[there(f"mlp.{kind}_{place}")] = ours[here(f"mlp.{name}", end)].T
    model.load_and_process_state_dict(
        {name: value.detach().clone() for name, value in theirs.items()},
        fold_value_biases=False,
    )
    return model.requires_grad_(False)


def one(lm: pellucid.LanguageModel, text: str) -> int:
    (token,) = lm.tokenizer.encode(text)
    return token


def test_what_each_part_adds_to_a_logit(lm, hooked):
    ids = torch.tensor([lm.encode(CLEAN)])
    right, wrong = one(lm, RIGHT), one(lm, WRONG)
    _, cache = hooked.run_with_cache(ids)
    parts, names = cache.get_full_resid_decomposition(
        expand_neurons=False, return_labels=True, apply_ln=True, pos_slice=-1
    )
    direction = hooked.W_U[:, right] - hooked.W_U[:, wrong]
    theirs = dict(zip(names, (parts[:, 0] @ direction).tolist(), strict=True))
    ours = pellucid.direct_logit_attribution(lm, CLEAN, RIGHT, against=WRONG)
    compared = 0
    for name, value in zip(ours.names, ours.values.tolist(), strict=True):
        layer, last = name.removeprefix("layers.").split(".")[0], name.split(".")[-1]
        there = f"L{layer}H{last}" if ".head." in name else f"{layer}_{last}_out"
        if there in theirs:
            assert value == pytest.approx(theirs[there], abs=2e-4), name
            compared += 1
    assert compared == 4 * 6 + 4


@pytest.mark.parametrize(
    ("names", "patches"), [("layers.*.attn.z", "head"), ("layers.*.resid_pre", "resid")]
)
def test_patching_one_place_after_another(names, patches, lm, hooked):
    from transformer_lens import patching

    right, wrong = one(lm, RIGHT), one(lm, WRONG)
    clean, corrupted = (torch.tensor([lm.encode(text)]) for text in (CLEAN, CORRUPTED))
    _, cache = hooked.run_with_cache(clean)
    patch = {
        "head": patching.get_act_patch_attn_head_out_all_pos,
        "resid": patching.get_act_patch_resid_pre,
    }[patches]
    theirs = patch(hooked, corrupted, cache, lambda x: x[0, -1, right] - x[0, -1, wrong])
    ours = pellucid.patch(lm, CLEAN, CORRUPTED, names, metric=(RIGHT, WRONG))
    torch.testing.assert_close(ours.values.float(), theirs, atol=2e-4, rtol=1e-4)


def test_the_logit_lens(lm, hooked):
    _, cache = hooked.run_with_cache(torch.tensor([lm.encode(CLEAN)]))
    stream = cache.accumulated_resid(layer=-1, incl_mid=False)  # (points, 1, T, C)
    theirs = hooked.unembed(hooked.ln_final(stream[:, 0])).softmax(-1)[:, -1].max(-1)
    lens = pellucid.logit_lens(lm, CLEAN).top(1)
    for ((text, share),), probability, token in zip(lens.values(), *theirs, strict=True):
        assert share == pytest.approx(float(probability), abs=1e-4)
        assert text == lm.decode([int(token)])


def test_scores_of_heads(lm, hooked):
    tokens = repeated_random_tokens(lm.model.config.vocab_size, length=24, rows=2, seed=0)
    scores = head_scores(lm.model, length=24, rows=2, seed=0)
    _, cache = hooked.run_with_cache(tokens)
    patterns = torch.stack([cache["pattern", layer] for layer in range(hooked.cfg.n_layers)])
    assert scores.previous.allclose(patterns.diagonal(-1, -2, -1).mean((1, 3)), atol=1e-5)
    second = patterns.diagonal(-23, -2, -1)[..., 1:]  # from a token of the second copy
    assert scores.induction.allclose(second.mean((1, 3)), atol=1e-5)
