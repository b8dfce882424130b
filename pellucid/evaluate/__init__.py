"""How good a model is: at predicting text, compared with another, at telling classes apart.

    score = evaluate_texts(model, encode_texts(tokenizer, [text]), context=256, stride=128)
    score.perplexity, score.bits_per_byte

| module | holds |
|---|---|
| windows.py | a sliding window over texts of any length: each token scored once |
| text.py | loss, perplexity, bits per byte |
| agreement.py | two models over the same windows: KL divergence, top-1 agreement |
| text_report.py | files of text to one report: ``pellucid eval --text`` |
| world.py | the small English world: held-out pages and an exam: ``pellucid eval --world`` |
| labels.py | a fine-tuned classifier over labelled texts: ``pellucid eval --labels`` |
| quantise.py | weight-only quantisation and what it costs in predictions |
| heads.py | how much each attention head copies and looks back |
| harness.py | the adapter by which lm-evaluation-harness drives a model |
"""

from pellucid.evaluate.agreement import compare_models
from pellucid.evaluate.text import (
    EncodedText,
    TextScore,
    encode_texts,
    evaluate_texts,
    token_losses,
)
from pellucid.evaluate.windows import Window, sliding_windows
from pellucid.train.finetune.classes import ClassReport, class_report

__all__ = [
    "ClassReport",
    "EncodedText",
    "TextScore",
    "Window",
    "class_report",
    "compare_models",
    "encode_texts",
    "evaluate_texts",
    "sliding_windows",
    "token_losses",
]
