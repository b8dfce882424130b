"""GPT-2's vocabulary and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import textbook_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import tokenizers
from pellucid.tokenizers import bytelevel, gpt2
from pellucid.tokenizers.bytelevel import ByteLevelTokenizer
from pellucid.tokenizers.hf import LibraryTokenizer

SAMPLES = [
    "Hello, world! It's 2024, they're here.",
    "   three spaces\n\n\ttab\r\nnew line   \n",
    "naïve café 日本語 русский 🦙🧪 e\u0301 ſ'S ǅ ½ ٣",
    "def f(x):\n    return x ** 2  # comment\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa          bbbbbbbb!!!!!!!!",
    "\x00\x01\x7f\x1c\u200b\u3000\ufeff",
]


@pytest.fixture(scope="module")
def real(assets: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(assets / "gpt2")


@pytest.mark.assets
def test_known_ids(real: tokenizers.Tokenizer) -> None:
    assert real.encode("Hello world") == [15496, 995]
    assert real.encode("Hello, I am") == [15496, 11, 314, 716]
    # The example of the book this project's GPT is measured by.
    text = "Akwirw ier"
    assert real.encode(text) == [33901, 86, 343, 86, 220, 959]
    assert real.encode("a<|endoftext|>", specials=True) == [64, 50256]
    assert (real.kind, real.vocab_size) == ("gpt2", 50_257)
    assert real.bos_id == real.eos_id == 50_256
    assert real.stop_ids == {50_256}
    assert not real.adds_bos
    assert isinstance(real, ByteLevelTokenizer)


@pytest.mark.assets
def test_the_real_ranks_against_the_textbook(real: tokenizers.Tokenizer) -> None:
    assert isinstance(real, ByteLevelTokenizer)
    pattern, ranks = bytelevel.GPT2_SPLIT.pattern, real._ranks

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.sampled_from("the answr TOigé日本語я  \n\t'sT1234!?.🦙"), max_size=60))
    def check(text: str) -> None:
        assert real.encode(text) == textbook_bpe.encode(text, pattern, ranks)

    check()


@pytest.mark.assets
@pytest.mark.peers
def test_the_tokenizers_library_gives_the_same_ids(
    assets: Path, real: tokenizers.Tokenizer
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    files = assets / "gpt2" / "encoder.json", assets / "gpt2" / "vocab.bpe"
    library = Tokenizer(models.BPE.from_file(*map(str, files)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(SAMPLES) | st.text(st.characters(exclude_categories=["Cs"])))
    def check(text: str) -> None:
        assert real.encode(text) == library.encode(text).ids

    check()


@pytest.mark.assets
@pytest.mark.peers
def test_transformers_gives_the_same_ids(
    assets: Path, real: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copy(assets / "gpt2" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(assets / "gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    peer = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    ours = tokenizers.load(tmp_path)
    for text in SAMPLES:
        assert ours.encode(text) == peer.encode(text) == real.encode(text)
        assert ours.decode(ours.encode(text)) == peer.decode(peer.encode(text))


def _write(folder: Path, vocab: dict[str, int], merges: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def _vocab(*more: str) -> dict[str, int]:
    tokens = [*bytelevel.byte_characters(), *more]
    return {token: id for id, token in enumerate(tokens)}


def test_either_half_names_the_tokenizer(tmp_path: Path) -> None:
    _write(tmp_path, _vocab("th", "the", "<|endoftext|>"), ["t h", "th e"])
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        tokenizer = tokenizers.load(path)
        assert tokenizer.kind == "gpt2"
        assert tokenizer.encode("the<|endoftext|>", specials=True) == [257, 258]
        assert tokenizer.specials == {"<|endoftext|>": 258}


def test_merges_out_of_order_go_through_the_library(tmp_path: Path) -> None:
    # "the" as (th, e), but (h, e) is the earlier merge and has the later id.
    _write(tmp_path, _vocab("th", "the", "he", "<|endoftext|>"), ["h e", "t h", "th e"])
    tokenizer = tokenizers.load(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    t = _vocab()["t"]
    assert tokenizer.encode("the") == [t, 258]
    assert tokenizer.decode([t, 258, 259]) == "the<|endoftext|>"
    assert tokenizer.eos_id == 259


def test_windows_line_ends(tmp_path: Path) -> None:
    _write(tmp_path, _vocab("th"), ["t h"])
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizers.load(tmp_path).encode("th") == [256]


def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    _write(tmp_path, _vocab("th"), ["t h", "th e"])
    with pytest.raises(ValueError, match=r"merge 'th' 'e' needs the token 'the'.*belong together"):
        tokenizers.load(tmp_path)
    _write(tmp_path, _vocab("th"), ["t h x"])
    with pytest.raises(ValueError, match=r"line 2: 't h x'; expected two tokens"):
        tokenizers.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(ValueError, match="gives each token its id"):
        gpt2.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match="half of a GPT-2 tokenizer"):
        tokenizers.load(tmp_path / "vocab.json")
