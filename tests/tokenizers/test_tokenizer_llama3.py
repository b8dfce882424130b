"""Llama 3's tokenizer.model: the known ids, the two special tables, damaged files."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import textbook_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import tokenizers
from pellucid.tokenizers import bytelevel, llama3

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is "


@pytest.mark.assets
def test_known_ids(assets: Path) -> None:
    tokenizer = tokenizers.load(assets / "llama3" / "tokenizer.model")
    # The first numbers of the public "llama3 from scratch" notebook.
    assert tokenizer.encode(ULTIMATE, bos=True) == [
        *(128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395),
        *(374, 220),
    ]  # fmt: skip
    assert (tokenizer.kind, tokenizer.vocab_size) == ("llama3", 128_256)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    assert tokenizer.stop_ids == {128_001, 128_008, 128_009}
    assert tokenizer.adds_bos
    assert tokenizer.token_string(128_009) == "<|eot_id|>"


@pytest.mark.assets
def test_the_real_ranks_against_the_textbook(assets: Path) -> None:
    tokenizer = tokenizers.load(assets / "llama3")
    ranks = llama3.read_ranks(assets / "llama3" / "tokenizer.model")

    @settings(max_examples=150, deadline=None)
    @given(
        st.text(st.sampled_from("the answr TOigé日本語я  \n\t'sT1234!?.🦙"), max_size=60)
        | st.text(st.characters(max_codepoint=0x7F, min_codepoint=0x20), max_size=60)
    )
    def check(text: str) -> None:
        expected = textbook_bpe.encode(text, bytelevel.LLAMA3_SPLIT.pattern, ranks)
        assert tokenizer.encode(text) == expected

    check()


def test_special_tokens_of_3_1_are_the_released_ones() -> None:
    table = llama3.special_tokens("3.1")
    lines = "\n".join(f"{id}\t{name}" for name, id in table.items())
    # Of the 256 added tokens in the tokenizer.json that Meta released with Llama 3.1, as a third
    # party published the sum.
    released = "ebbf6dbf38ef61c1554ba8101087efde62220b2dc3a5b1f2f8aa24b10a8dd973"
    assert hashlib.sha256(lines.encode()).hexdigest() == released
    assert table["<|finetune_right_pad_id|>"] == 128_004
    assert table["<|eom_id|>"] == 128_008
    assert table["<|python_tag|>"] == 128_010


def test_special_tokens_of_3_0() -> None:
    table = llama3.special_tokens("3.0")
    assert len(table) == 256
    assert table["<|reserved_special_token_0|>"] == 128_002
    assert table["<|reserved_special_token_3|>"] == 128_005
    assert table["<|start_header_id|>"] == 128_006
    assert table["<|end_header_id|>"] == 128_007
    assert table["<|reserved_special_token_4|>"] == 128_008
    assert table["<|eot_id|>"] == 128_009
    assert table["<|reserved_special_token_5|>"] == 128_010
    assert table["<|reserved_special_token_250|>"] == 128_255
    assert "<|eom_id|>" not in table


def test_versions_differ_in_where_they_stop(small_ranks: dict[bytes, int]) -> None:
    first = len(small_ranks)
    old, new = (llama3.from_ranks(small_ranks, version) for version in ("3.0", "3.1"))
    assert old.stop_ids == {first + 1, first + 9}
    assert new.stop_ids == {first + 1, first + 8, first + 9}


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({}, "3.1"),
        ({"params.json": {"dim": 4096, "rope_theta": 500000.0}}, "3.0"),
        ({"params.json": {"dim": 4096, "use_scaled_rope": True}}, "3.1"),
        ({"config.json": {"max_position_embeddings": 8192, "rope_scaling": None}}, "3.0"),
        (
            {
                "config.json": {
                    "max_position_embeddings": 131072,
                    "rope_scaling": {"rope_type": "llama3"},
                }
            },
            "3.1",
        ),
        (
            {
                "config.json": {
                    "max_position_embeddings": 131072,
                    "rope_parameters": {"rope_type": "llama3"},
                }
            },
            "3.1",
        ),
        ({"tokenizer_config.json": {"a": "<|begin_of_text|>", "b": "<|eom_id|>"}}, "3.1"),
        ({"tokenizer.json": {"a": ["<|begin_of_text|>", "<|eot_id|>"]}}, "3.0"),
        # The tokenizer's own files say more than the model's.
        (
            {
                "tokenizer.json": {"a": ["<|begin_of_text|>", "<|python_tag|>"]},
                "params.json": {"dim": 4096},
            },
            "3.1",
        ),
    ],
)
def test_the_version_is_found_beside_the_file(
    tmp_path: Path, files: dict[str, object], version: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert llama3.find_version(tmp_path) == version


@pytest.mark.assets
def test_the_version_can_be_said(assets: Path) -> None:
    old = tokenizers.load(assets / "llama3", version="3.0")
    assert old.specials["<|reserved_special_token_4|>"] == 128_008
    with pytest.raises(ValueError, match=r"version '3\.2': expected '3\.0' or '3\.1'"):
        tokenizers.load(assets / "llama3", version="3.2")


def _write(path: Path, tokens: list[bytes]) -> list[bytes]:
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return lines


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    lines = _write(path, [bytes([byte]) for byte in range(256)])
    with pytest.raises(ValueError, match=r"256 ranks, but Llama 3 has 128,000; the file is cut"):
        tokenizers.load(path)
    damaged = {
        b"".join(lines) + b"YWI": r"line 257: 'YWI'; expected a base64 token",
        b"".join(lines) + b"YW= 256\n": r"line 257",
        b"".join(lines) + b"YWI= x\n": r"line 257",
        b"".join(lines) + b"AA== 256\n": r"line 257: the token of rank 0 comes again as rank 256",
        b"".join(lines) + b"YWI= 255\n": r"ranks are not 0 … 256 once each",
        b"".join(lines) + b"YWI= 300\n": r"ranks are not 0 … 256 once each",
    }
    for content, message in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            tokenizers.load(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
