"""Settings files and .pth archives from outside: refused before they cost anything."""

from __future__ import annotations

import os

import pytest
import torch

from pellucid.checkpoints.files import PthFile
from pellucid.diff.served.logs import read_logs
from pellucid.files import parse_json, parse_toml, parse_yaml, read_json, read_text
from pellucid.gguf_file import read_header


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    for path in (pipe, type(pipe)("/dev/zero")):
        with pytest.raises(ValueError, match="not a file"):
            read_json(path)
        with pytest.raises(ValueError, match="not a file"):
            PthFile(path)
        with pytest.raises(ValueError, match="not a file"):
            read_logs(path, None)
        with pytest.raises(ValueError, match="not a file"):
            read_header(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "a.json is not JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ('{"a": ' + "9" * 5000 + "}", "a.json is not JSON"),
        ("", "a.json is not JSON"),
    ],
)
def test_json_that_is_none_is_one_line_with_the_file(tmp_path, text, expected):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_json, '{{"a": [1, {{"b": {}}}]}}'),
        (parse_toml, "a = [1, {{ b = {} }}]"),
        (parse_yaml, "a: [1, {{b: {}}}]"),
    ],
)
def test_a_number_has_a_hundred_digits_at_most(parse, text):
    for digits in (1, 100):
        for sign in ("", "-"):
            number = sign + "9" * digits
            if len(number) <= 100:
                assert parse(text.format(number), "a") == {"a": [1, {"b": int(number)}]}
    for odd in ('"text"', "1.5", "true"):
        assert parse(text.format(odd), "a")["a"][0] == 1
    with pytest.raises(ValueError, match=r"^a[: ].*number of (101|more than 100) digits"):
        parse(text.format("9" * 101), "a")


def test_a_byte_order_mark_and_a_size(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr("pellucid.files.LARGEST_TEXT", 5)
    with pytest.raises(ValueError, match="11 bytes of text; expected 5 or fewer"):
        read_text(path)


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_a_tensor_without_dense_values_is_refused_by_name(tmp_path, odd):
    path = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": odd}, path)
    with pytest.raises(ValueError, match=r"norm.weight is no dense tensor|not a whole .pth"):
        PthFile(path)
