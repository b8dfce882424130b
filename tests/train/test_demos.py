"""The two models that ship: small, whole, and with the structure that docs/demos.md tells of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import pellucid
from pellucid import checkpoints, tokenizers
from pellucid.evaluate.heads import head_scores, strongest
from pellucid.train import evaluate

FOLDER = Path(pellucid.__file__).parent / "demos"
# name -> class, parameters, head that looks at the token before, induction head
DEMOS = {
    "demo": ("llama", 1_967_808, (1, 2), (3, 3)),
    "demo-gpt2": ("gpt2", 2_222_208, (0, 1), (2, 5)),
}


def test_both_together_take_at_most_12_mb():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"llama", "gpt2"}
    assert sum(path.stat().st_size for path in files) <= 12_000_000


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
