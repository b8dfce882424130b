"""A vocabulary from a text: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019);
or simply its characters."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pellucid.tokenizers import hf
from pellucid.tokenizers.base import Tokenizer, valid_unicode
from pellucid.tokenizers.bytelevel import LLAMA3_SPLIT

# Numbers in pieces of at most three digits and line breaks apart from words: Llama 3's split gives
# a small vocabulary less to spend on particular numbers and on indentation than GPT-2's.
SPLIT = LLAMA3_SPLIT
MOST_TOKENS = 1 << 22  # sixteen times the largest vocabulary in use


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | os.PathLike[str],
    specials: Sequence[str] = ("<|endoftext|>",),
) -> Tokenizer:
    """Learn a vocabulary and write it to `folder` as tokenizer.json and tokenizer_config.json.

    Any text can be encoded with it, because all 256 bytes are in it. The same texts give the same
    files.

    Args:
        texts: the corpus, in any portions; merges do not cross from one into the next.
        vocab_size: number of tokens at most; a small corpus runs out of pairs earlier.
        specials: special tokens, ids 0, 1 …; the first begins and ends texts.

    Returns:
        the tokenizer, as `load(folder)` gives it.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens, or is more
            than `MOST_TOKENS`, for which the library would take memory before it learns.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    needed = 256 + len(specials)
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens "
            f"need {needed}"
        )
    if vocab_size > MOST_TOKENS:
        raise ValueError(f"vocab_size {vocab_size:,}: expected {MOST_TOKENS:,} or fewer tokens")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(map(valid_unicode, texts), trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Not engine.save: of a full disk the library says it in an exception of no class.
    (folder / "tokenizer.json").write_text(engine.to_str(pretty=True), "utf-8")
    (folder / "tokenizer_config.json").write_text(_roles(specials), "utf-8")
    return hf.from_file(folder / "tokenizer.json")


def train_characters(texts: Iterable[str], folder: str | os.PathLike[str]) -> Tokenizer:
    """One token for each character that occurs, in the order of Unicode; written to `folder`.

    There are no special tokens, and text with any other character is a ValueError. It is the
    vocabulary of small experiments, such as nanoGPT's on Shakespeare.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    characters = sorted(set().union(*map(valid_unicode, texts)))
    if not characters:
        raise ValueError("no text to take characters from")
    engine = tokenizers.Tokenizer(
        models.WordLevel({text: id for id, text in enumerate(characters)})
    )
    engine.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    engine.decoder = decoders.Fuse()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(_roles(()), "utf-8")
    return hf.from_file(folder / "tokenizer.json")


def _roles(specials: Sequence[str]) -> str:
    """tokenizer_config.json: the first special token begins and ends texts."""
    role = specials[0] if specials else None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": role,
        "eos_token": role,
        "add_bos_token": role is not None,  # as in training, where it stands before each text
        # Decoding must give the text back; transformers would otherwise tidy up spaces before
        # punctuation.
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2) + "\n"
