"""The examples of docs/api.md, sent to a server."""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import urlsplit

import pytest
from conftest import ROOT
from serving import served

import pellucid
from pellucid.serve import Rules, ServedModel

PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
CURLS = re.findall(r"^```curl\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def client():
    with served(ServedModel(pellucid.load("demo"), "demo"), rules=Rules(key="KEY")) as client:
        yield client


@pytest.mark.parametrize("number", range(len(CURLS)))
def test_commands_of_curl(client, number):
    name, url, *options = shlex.split(CURLS[number])
    assert (name, len(options)) == ("curl", 2 * (len(options) // 2))
    given = dict(zip(options[::2], options[1::2], strict=True))
    headers = {"Authorization": "Bearer KEY"} | dict(
        [given["-H"].split(": ", 1)] if "-H" in given else []
    )
    method, body = ("POST", given["-d"]) if "-d" in given else ("GET", None)
    answer = client.request(method, urlsplit(url).path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    if body and json.loads(body).get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    elif body:
        assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.peers
def test_the_client_of_openai(client, capsys):
    openai = pytest.importorskip("openai")
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    url = str(client.base_url).rstrip("/")
    code = code.replace("http://127.0.0.1:8000", url).replace('"none"', '"KEY"')
    exec(code, {})
    printed = capsys.readouterr().out.removesuffix("\n")
    lm = pellucid.load("demo")
    assert printed == lm.generate("import os", max_new_tokens=8, temperature=0.0)
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="KEY")
    ask = {"model": "demo", "prompt": "import os", "max_tokens": 8, "temperature": 0}
    streamed = own.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == printed
    with pytest.raises(openai.BadRequestError, match="suffix"):
        own.completions.create(**ask, suffix="x")
