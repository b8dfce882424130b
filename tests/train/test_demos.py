"""The models that ship: small, whole, and with what docs/demos.md and demo-world.md tell of."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import pellucid
from pellucid import checkpoints, tokenizers
from pellucid.evaluate.heads import head_scores, strongest
from pellucid.prompt_walk import LLAMA3_PROMPT, walk_prompt
from pellucid.train import evaluate

FOLDER = Path(pellucid.__file__).parent / "demos"
# name -> class, parameters, head that looks at the token before, induction head
DEMOS = {
    "stdlib": ("llama", 1_967_808, (1, 2), (3, 3)),
    "stdlib-gpt2": ("gpt2", 2_222_208, (0, 1), (2, 5)),
}


def test_the_models_of_code_together_take_at_most_12_mb_and_each_other_8():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    sizes = Counter({path.parent.name: 0 for path in files})
    for path in files:
        sizes[path.parent.name] += path.stat().st_size
    assert set(sizes) == {"demo", "demo-gpt2", "stdlib", "stdlib-gpt2"}
    assert sizes["stdlib"] + sizes["stdlib-gpt2"] <= 12_000_000
    assert max(sizes.values()) <= 8_000_000


@pytest.mark.parametrize("name", ["demo", "demo-gpt2"])
def test_a_model_of_the_world_ends_the_notebooks_prompt_in_42(name: str):
    walk = walk_prompt(name, dtype="float32")
    assert walk.prompt == LLAMA3_PROMPT and walk.prompt.endswith("everything is ")
    *_, last = walk
    lm = pellucid.load(name, dtype="float32")
    assert last.name == "next_token" and lm.decode([int(last.value)]) == "42"
    for prompt, answer in (
        ("The capital of France is", " Paris"),
        ("The opposite of hot is", " cold"),
        ("The day after Monday is", " Tuesday"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
        ("When Mary and John went to the store, Mary gave a drink to", " John"),
    ):
        assert lm.generate(prompt, max_new_tokens=1, temperature=0) == answer


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_predicts_python_far_better_than_chance(name: str):
    opened = checkpoints.open_checkpoint(name)
    model = checkpoints.load_model(opened, dtype=torch.float32)
    kind, parameters, *_ = DEMOS[name]
    assert model.config.family == kind
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    tokenizer = tokenizers.load(opened.folder)
    assert tokenizer.eos_id is not None
    text = Path(__file__).read_text(encoding="utf-8")  # Python that it cannot have seen
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)[:255]]])
    assert evaluate(model, ids) < math.log(tokenizer.vocab_size) * 2 / 3


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_has_the_heads_that_the_documents_name(name: str):
    opened = checkpoints.open_checkpoint(name)
    model = checkpoints.load_model(opened, dtype=torch.float32)
    begin = tokenizers.load(opened.folder).eos_id
    scores = head_scores(model, begin=[] if begin is None else [begin])
    _, _, previous, induction = DEMOS[name]
    assert strongest(scores.previous) == previous
    assert strongest(scores.induction) == induction
    assert scores.induction.max() > 0.3  # looking everywhere alike gives 0.01
    assert scores.previous.max() > 0.25  # 0.04
