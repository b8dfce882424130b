"""What a researcher asks of a model: batches, edits by glob and address, losses, generation."""

from __future__ import annotations

import pytest
import torch

import pellucid
from pellucid import LanguageModel
from pellucid.trace import trace
from tests.tiny import GPT, LLAMA, random_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return pellucid.load("stdlib", dtype="float32")


IDS = [5, 6, 7, 8, 9, 10]


def test_a_batch_gives_each_prompt_what_it_gives_alone(lm):
    prompts = ["import os", "def f(x):\n    return x"]
    seen = lm.trace(prompts)
    padding, ids = seen.meta["padding"], seen.meta["tokens"]
    assert padding[0] > 0 == padding[1]
    for row, prompt in enumerate(prompts):
        alone = lm.trace(prompt)
        assert ids[row] == alone.meta["tokens"]
        kept = slice(padding[row], None)
        for name in ("layers.1.resid_post", "logits"):
            torch.testing.assert_close(seen[name][row, kept], alone[name][0], rtol=1e-4, atol=1e-4)
        pattern = seen["layers.2.attn.pattern"][row, :, kept, kept]
        torch.testing.assert_close(pattern, alone["layers.2.attn.pattern"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lm(prompts), seen["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prompts", [IDS, [IDS], torch.tensor(IDS), torch.tensor([IDS]), [torch.tensor(IDS)]],
    ids=["ids", "list of ids", "tensor", "tensor of rows", "list of tensors"],
)  # fmt: skip
def test_a_prompt_may_be_ids_in_any_form(lm, prompts):
    seen = lm.trace(prompts, only="logits")
    torch.testing.assert_close(seen["logits"], lm.trace(IDS, only="logits")["logits"])


def test_what_is_no_prompt_is_said(lm):
    with pytest.raises(TypeError, match="expected token ids"):
        lm.trace(torch.rand(2, 3))
    with pytest.raises(TypeError, match="a prompt is a int"):
        lm.trace(3)
    with pytest.raises(ValueError, match="no tensor of this model is called .*; did you mean"):
        lm.trace("a", only="layers.*.attn.patern")
    with pytest.raises(ValueError, match=r"did you mean \*.attn.\*\?"):
        lm.trace("a", only="*.atn.*")
    with pytest.raises(ValueError, match="expected one number of the logits"):
        lm.trace("a", gradients=lambda logits: logits[0, -1])


def test_the_loss_is_what_cross_entropy_says_row_by_row(lm):
    rows = [IDS, IDS[:3]]
    total = torch.tensor(0.0)
    for row in rows:
        logits = lm([row])[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    torch.testing.assert_close(lm.loss(rows), total / (len(IDS) - 1 + 2), rtol=1e-5, atol=1e-5)
    assert lm.loss(rows).requires_grad
    with pytest.raises(ValueError, match="no next token"):
        lm.loss([[5]])


def test_decode_undoes_encode(lm):
    assert lm.decode(torch.tensor(lm.tokenizer.encode("import os"))) == "import os"


def test_to_moves_and_converts():
    model = pellucid.load("stdlib").to(dtype="float64")
    assert model.dtype == torch.float64 and model(IDS).dtype == torch.float64
    with pytest.raises(ValueError, match="PyTorch finds"):
        model.to("cuda:9")


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_an_edit_by_address_is_the_one_made_by_hand(config):
    model = random_model(config)
    tokens = torch.tensor([IDS])

    def third(z):
        z[:, :, 2] = 0
        return z

    names = [f"layers.{layer}.attn.z" for layer in range(config.n_layers)]
    with trace(model, "logits", edit=dict.fromkeys(names, third)) as by_hand:
        model(tokens)
    with trace(model, "logits", edit={"layers.*.attn.z[:,2]": 0}) as by_address:
        model(tokens)
    with trace(model, "logits", edit={"blocks.*.attn.hook_z[:, 2]": 0}) as by_other_name:
        model(tokens)
    with trace(model, "logits") as clean:
        model(tokens)
    assert torch.equal(by_hand["logits"], by_address["logits"])
    assert torch.equal(by_hand["logits"], by_other_name["logits"])
    assert torch.equal(by_hand["logits"][:, :2], clean["logits"][:, :2])
    assert not torch.allclose(by_hand["logits"][:, 2], clean["logits"][:, 2])


def test_an_edit_is_a_tensor_or_a_function_of_a_tensor_and_its_name():
    model, tokens, met = random_model(LLAMA), torch.tensor([IDS]), []
    row = torch.arange(36.0, dtype=torch.float64)
    edit = {
        "layers.1.resid_pre[3]": row,
        "layers.*.mlp_out": lambda x, name: met.append(name) or x * 2,
    }
    with trace(model, edit=edit) as seen:
        model(tokens)
    assert torch.equal(seen["layers.1.resid_pre[3]"], row)
    assert met == ["layers.0.mlp_out", "layers.1.mlp_out"]
    for wrong, said in (
        ({"embed[9]": 0}, "no such part of embed"),
        ({"embed": torch.zeros(7)}, "does not fit"),
        ({"embed": "0"}, "expected a number"),
    ):
        error = pytest.raises((IndexError, ValueError, TypeError), match=said)
        with error, trace(model, edit=wrong):
            model(tokens)


def test_an_edit_of_a_row_of_a_batch_leaves_the_others_alone():
    model = random_model(LLAMA)
    tokens = torch.tensor([IDS, IDS])
    with trace(model, "logits", edit={"layers.0.attn_out[1]": 0}) as seen:
        model(tokens)
    with trace(model, "logits") as clean:
        model(tokens)
    assert torch.equal(seen["logits"][0], clean["logits"][0])
    assert not torch.equal(seen["logits"][1], clean["logits"][1])


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3}])
def test_generation_follows_an_edit(lm, sampling):
    plain = lm.generate("import", max_new_tokens=6, fast=False, **sampling)
    nothing = {"layers.*.mlp_out": lambda x: x}
    assert lm.generate("import", max_new_tokens=6, edit=nothing, **sampling) == plain
    # A direction added to the stream that is the row of one token in the head, and wins.
    head = lm.model.unembed.weight if lm.model.unembed is not None else lm.model.embed.weight
    wanted = lm.tokenizer.encode(" os")[-1]
    steered = {"final_norm": lambda x: head[wanted].expand_as(x) * 100}
    assert lm.generate("import", max_new_tokens=2, edit=steered, temperature=0.0) == (
        lm.decode([wanted, wanted])
    )
    assert lm.generate("import", max_new_tokens=6, fast=False, **sampling) == plain


def test_other_models_run_as_ever_between_the_pieces_of_an_edited_text(lm):
    pieces = lm.stream("import", max_new_tokens=4, temperature=0.0, edit={"layers.0.attn_out": 0})
    next(pieces)
    with trace(lm.model, "logits") as seen:
        lm.model(torch.tensor([IDS]))
    assert torch.equal(seen["logits"], lm.trace(IDS, only="logits")["logits"])
    assert list(pieces)


def test_an_edit_that_means_nothing_is_said_before_anything_runs(lm):
    with pytest.raises(KeyError, match="did you mean layers.0.attn.z"):
        lm.generate("import", edit={"layers.0.atn.z": 0})
    with pytest.raises(ValueError, match="edits act in PyTorch"):
        lm.generate("import", edit={"layers.0.attn.z": 0}, fast=True)


@pytest.mark.parametrize("names", ["layers.*.resid_mid", "blocks.*.attn.hook_z"])
def test_patching_equals_runs_that_are_patched_by_hand(lm, names):
    clean, corrupted = [5, 6, 7, 8], [5, 9, 7, 8]
    table = pellucid.patch(lm, clean, corrupted, names, metric=lambda x: x[0, -1, 3])
    source = lm.trace(clean)
    assert table.values.shape == (lm.config.n_layers, len(table.columns))
    for layer, column in ((0, 1), (lm.config.n_layers - 1, 3)):
        name = table.rows[layer]
        at = f"{name}[{column}]"
        seen = lm.trace(corrupted, "logits", edit={at: source[at]})
        torch.testing.assert_close(
            table.values[layer, column], seen["logits"][0, -1, 3], rtol=1e-4, atol=1e-4
        )
    assert table.clean == pytest.approx(float(source["logits"][0, -1, 3]), rel=1e-5)
    assert str(table).count("\n") == lm.config.n_layers + 1 and "<table>" in table._repr_html_()


def test_patching_all_of_a_layer_restores_the_clean_run(lm):
    """At the token that differs, the whole stream before any layer has looked elsewhere."""
    table = pellucid.patch(lm, [5, 6, 7, 8], [5, 9, 7, 8])
    assert table.restored[0, 1] == pytest.approx(1, abs=1e-4)
    assert table.restored[0, [0, 2, 3]].abs().max() < 1e-4
    assert table.restored[-1, 3] != pytest.approx(0, abs=1e-3)


def test_what_cannot_be_patched_is_said(lm):
    for arguments, said in (
        (([5, 6], [5, 6, 7]), "must be of equal length"),
        (([5, 6], [5, 7], "logits"), "matches 0 kinds"),
        (([5, 6], [5, 7], "layers.*"), "name one"),
        (([5, 6], [5, 6]), "both tokens are"),
        (([5, 6], [5, 7], "layers.*.embd"), "no tensor of this model"),
    ):
        with pytest.raises(ValueError, match=said):
            pellucid.patch(lm, *arguments)
    with pytest.raises(ValueError, match="has no heads"):
        pellucid.patch(lm, [5, 6], [5, 7], heads=True)


def test_the_lens_ends_in_the_models_own_logits(lm):
    lens = pellucid.logit_lens(lm, IDS)
    own = lm.trace(IDS, only=["logits", "layers.1.resid_pre"])
    torch.testing.assert_close(lens.logits[-1], own["logits"][0])
    by_hand = lm.model.logits(lm.model.norm(own["layers.1.resid_pre"]))[0]
    torch.testing.assert_close(lens.logits[1], by_hand)
    (name, ((text, share), _)) = list(lens.top(2).items())[-1]
    assert name.endswith("resid_post") and text == lm.tokenizer.token_string(
        int(own["logits"][0, -1].argmax())
    )
    assert 0 < share < 1


def test_the_parts_of_a_logit_are_what_each_head_writes(lm):
    token, other = 11, 400
    found = pellucid.direct_logit_attribution(lm, IDS, token, other)
    seen = lm.trace(IDS)
    difference = float(seen["logits"][0, -1, token] - seen["logits"][0, -1, other])
    assert found.total == pytest.approx(difference, abs=1e-4)
    assert float(found.values.sum()) == pytest.approx(difference, abs=1e-3)
    weights, stream = lm.weights(), seen["layers.3.resid_post"][0, -1].double()
    size = (stream.square().mean() + lm.config.norm_eps).sqrt()
    direction = (weights["embed.weight"][token] - weights["embed.weight"][other]).double()
    direction = direction * weights["norm.weight"].double() / size
    columns = weights["layers.2.attn.o_proj.weight"].double().unflatten(1, (lm.config.n_heads, -1))
    by_hand = (columns[:, 3] @ seen["layers.2.attn.z"][0, 3, -1].double()) @ direction
    assert float(found.heads[2, 3]) == pytest.approx(float(by_hand), abs=1e-5)
    assert list(found.top(1).values()) == [pytest.approx(float(v)) for v in found.values
                                           if abs(v) == found.values.abs().max()]  # fmt: skip
    assert "logit of" in str(found) and next(iter(found.top(1))) in str(found)
    best = pellucid.direct_logit_attribution(lm, IDS)
    assert best.total == pytest.approx(float(seen["logits"][0, -1].max()), abs=1e-4)


def test_the_jobs_of_heads(lm):
    prompt = "def f(value, other):\n    return other"
    jobs = pellucid.head_jobs(lm, [(prompt, " other", " return")])
    alone = pellucid.direct_logit_attribution(lm, prompt, " other", " return")
    assert jobs.name_mover is not None and jobs.to_answer is not None
    torch.testing.assert_close(jobs.name_mover, alone.heads)
    ids = lm.encode(prompt)
    place = len(ids) - 1 - ids[::-1].index(lm.tokenizer.encode(" other")[0])
    pattern = lm.trace(prompt)["layers.3.attn.pattern"]
    torch.testing.assert_close(jobs.to_answer[3], pattern[0, :, -1, place])
    layer, head, score = jobs.strongest()["previous"]
    assert score == float(jobs.previous[layer, head]) == float(jobs.previous.max())
    plain = pellucid.head_jobs(lm)
    assert plain.name_mover is None and set(plain.strongest()) == {"previous", "induction"}
    with pytest.raises(ValueError, match="does not stand in"):
        pellucid.head_jobs(lm, [(prompt, " class", " return")])
    with pytest.raises(ValueError, match="tokens: give one"):
        pellucid.direct_logit_attribution(lm, prompt, "no token")


def test_steering_adds_a_direction(lm):
    direction = torch.randn(lm.config.width, generator=torch.Generator().manual_seed(0))
    edit = pellucid.steer("layers.1.resid_post", direction, 3.0)
    steered = lm.trace(IDS, "layers.1.resid_post", edit=edit)["layers.1.resid_post"]
    plain = lm.trace(IDS, "layers.1.resid_post")["layers.1.resid_post"]
    torch.testing.assert_close(steered, plain + 3 * direction)


def test_transformer_lens_names_find_the_same_tensors(lm):
    seen = lm.trace(IDS, gradients=lambda logits: logits[0, -1].max())
    for theirs, ours in (
        ("hook_embed", "embed"),
        ("blocks.1.hook_resid_mid", "layers.1.resid_mid"),
        ("blocks.1.attn.hook_attn_scores[2]", "layers.1.attn.masked_scores[2]"),
        ("blocks.0.mlp.hook_post", "layers.0.mlp.hidden"),
    ):
        assert torch.equal(seen[theirs], seen[ours])
        assert torch.equal(seen.grad(theirs), seen.grad(ours))
        assert theirs in seen
    assert "blocks.1.hook_nothing" not in seen
    assert list(lm.trace(IDS, only="blocks.*.attn.hook_pattern")) == [
        f"layers.{layer}.attn.pattern" for layer in range(lm.config.n_layers)
    ]


def test_the_package_lists_its_calls():
    assert set(pellucid.__all__) <= set(dir(pellucid))
    for name in pellucid.__all__:
        assert callable(getattr(pellucid, name))
