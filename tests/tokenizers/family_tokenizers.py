"""Small tokenizers in the forms in which the families' releases come, made here.

Normaliser, pre-tokenizer, decoder and added tokens are those of the released tokenizer.json of each
family; only the vocabulary is learned from a few lines. `HARD` are texts on which they differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizer_samples import CORPUS
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from pellucid.tokenizers.bytelevel import LLAMA3_SPLIT, SINGLE_DIGIT_SPLIT

HARD = (
    " ", "  ", "   x", "x   ", " leading", "trailing ", "\n", "\n\n", "\n\n\n\nx", "\r\n\r\n",
    "\t\tx\t y", " \n \n  z", "a\u00a0b\u2003c\u3000d", "12345", "1", "a1b22c333", "3.14159e-10",
    "x==y!=z<=1", "...!!??", "don't WE'LL I'M it's 'S", "Caf\u00e9 na\u00efve fa\u00e7ade",
    "e\u0301 o\u0308", "\ufb01\ufb02 \uff21\u2460 \u00b2\u00b3", "\u4e2d\u6587\u6d4b\u8bd5",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u0661\u0662\u0663\u0664", "\u0939\u093f\u0928\u094d\u0926\u0940", "\U0001f642\U0001f999",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7", "\x00\x01\x7f\u200b\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n", "<|eot_id|>", "<end_of_turn>\n<start_of_turn>", "</s><s>",
    "<|end|>", " <|end|> ", "<|end|>\n x", "<|im_start", "<tool_call>\n{}</tool_call>",
    "<0x41>",
    "def f(x):\n    return x  # 4\n\n\tif y:\n", "the quick brown fox " * 4, "a" * 60,
    "\u2581x \u2581",
    "$5.00+<=>^~|`", "-" * 40, "http://a.b/c?d=e&f=%20", "ALL CAPS Title mIxEd",
)  # fmt: skip
CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Name 3 colours.\n"},
    {"role": "assistant", "content": "Red, \u7eff and blue."},
    {"role": "user", "content": "Why? \U0001f642"},
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set r = 'model' if m.role == 'assistant' else 'user' "
    "%}{{ '<start_of_turn>' + r + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_ROLES = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
    "'<|end_of_text|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A family's form. `gguf`: llama.cpp's word for how it cuts, or "" where it has none."""

    cut: str = ""
    nfc: bool = False
    digits: bool = False
    pieces: bool = False
    prefix: bool = False
    specials: tuple[str, ...]
    added: tuple[str, ...] = ()
    stripping: bool = False
    template: str = _CHATML
    config: dict[str, Any] = field(default_factory=dict)
    gguf: str = ""


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FORMS: dict[str, Form] = {
    "qwen2": Form(
        cut=SINGLE_DIGIT_SPLIT.pattern, nfc=True, specials=_QWEN, gguf="qwen2",
        config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
                "bos_token": None, "add_bos_token": False},
    ),
    "qwen3": Form(
        cut=SINGLE_DIGIT_SPLIT.pattern, nfc=True, specials=_QWEN, gguf="qwen2",
        added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
    ),
    "llama3": Form(
        cut=LLAMA3_SPLIT.pattern, template=_LLAMA3, gguf="llama-bpe",
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eot_id|>"),
        config={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "mistral nemo": Form(
        cut=TEKKEN, specials=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), gguf="tekken",
        config={"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "olmo": Form(
        nfc=True, specials=("<|endoftext|>", "<|padding|>"), added=("|||IP_ADDRESS|||",),
        config={"eos_token": "<|endoftext|>", "bos_token": None}, gguf="olmo",
    ),
    "olmo2": Form(
        cut=LLAMA3_SPLIT.pattern, specials=(*_QWEN, "<|pad|>"), gguf="dbrx",
        config={"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    ),
    "granite": Form(
        digits=True, template=_ROLES, gguf="refact",
        specials=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        config={"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "smollm2": Form(
        digits=True, specials=_QWEN, gguf="smollm",
        config={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "command-r": Form(
        digits=True, nfc=True, specials=("<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN|>"),
        gguf="command-r", config={"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN|>"},
    ),
    "gemma": Form(
        pieces=True, template=_GEMMA,
        specials=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        added=("\n\n", "\n\n\n\n", "\u2581\u2581", "\u2581" * 4, "<table>", "[@BOS@]"),
        config={"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                "add_bos_token": True},
    ),
    "llama2": Form(
        pieces=True, prefix=True, specials=("<unk>", "<s>", "</s>"), template=_PHI3,
        config={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True},
    ),
    "phi3": Form(
        pieces=True, prefix=True, template=_PHI3, stripping=True,
        specials=("<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>",
                  "<|assistant|>", "<|end|>"),
        config={"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>",
                "add_bos_token": False},
    ),
}  # fmt: skip


def made(form: Form) -> Tokenizer:
    """The tokenizer of a form, learned from the corpus of the tests."""
    engine = Tokenizer(
        BPE(
            byte_fallback=form.pieces,
            fuse_unk=form.pieces,
            unk_token="<unk>" if form.pieces else None,
        )
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not form.pieces else []
    specials = [*form.specials, *(f"<0x{byte:02X}>" for byte in range(256) if form.pieces)]
    if form.pieces:
        engine.normalizer = _piece_normaliser(form)
        engine.pre_tokenizer = (
            None if form.prefix else pre_tokenizers.Split(" ", "merged_with_previous")
        )
        strip = [decoders.Strip(" ", 1, 0)] if form.prefix else []
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        engine.decoder = decoders.Sequence(steps)
    else:
        engine.normalizer = normalizers.NFC() if form.nfc else None
        engine.pre_tokenizer = _byte_level(form)
        engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    lines = [" ".join(line.split(" ")) for line in CORPUS.splitlines(keepends=True)] * 3
    if form.prefix:  # words only: the model has no cut of its own
        lines = [word for line in lines for word in line.replace(" ", " \u241f").split("\u241f")]
    engine.train_from_iterator(lines, trainer)
    return engine


def _piece_normaliser(form: Form) -> Any:
    spaces = normalizers.Replace(" ", "\u2581")
    return normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if form.prefix else spaces


def _byte_level(form: Form) -> Any:
    if form.cut:
        cut = pre_tokenizers.Split(Regex(form.cut), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([cut, level])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if form.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    return level


def written(form: Form, folder: Path) -> Path:
    """The folder of a form: tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads(made(form).to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] in form.specials
        strips = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
        token["rstrip"] = form.stripping and strips
    document["added_tokens"] = [t for t in document["added_tokens"] if t["special"]]
    last = max([*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])])
    for number, text in enumerate(form.added, last + 1):
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        document["added_tokens"].append({"id": number, "content": text, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **form.config}
    config["chat_template"] = form.template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder
