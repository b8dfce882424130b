"""The explorer's endpoints on a real socket, against the run and the trace in this process."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from exploring import language_model
from serving import eventually, served
from tiny import GPT, LLAMA

from pellucid.serve import Rules, ServedModel
from pellucid.serve.page_files import PageFiles

IDS = [5, 17, 3, 80, 41, 17, 3]


@pytest.fixture(scope="module")
def models():
    return {
        "gpt": language_model(GPT),
        "llama": language_model(LLAMA, torch.bfloat16, "meta"),
    }


@pytest.fixture(scope="module")
def client(models):
    with served(*(ServedModel(lm, name, fast=False) for name, lm in models.items())) as client:
        yield client


def get(client, path: str, **query):
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer


def start(client, model: str, **more) -> dict:
    answer = client.post("/api/runs", json={"model": model, "ids": IDS, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_every_tensor_is_the_traces_to_the_byte(client, models, model):
    manifest, seen = start(client, model), models[model].trace(IDS)
    path = f"/api/runs/{manifest['run']}/tensor"
    assert [step["id"] for step in manifest["steps"]] == list(seen)
    for step in manifest["steps"]:
        whole = seen[step["id"]]
        whole = (
            whole[0] if step["id"] not in ("positions", "mask") and whole.shape[0] == 1 else whole
        )
        answer = get(client, path, at=step["id"])
        assert answer.content == whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = ",".join(map(str, whole.shape))
        assert answer.headers["x-shape"] == shape == ",".join(map(str, step["shape"]))
        assert answer.headers["x-dtype"] == str(whole.dtype)[6:] == step["dtype"]
    part = get(client, path, at="layers.1.attn.scores[2,1:5,:3]")
    expected = seen["layers.1.attn.scores[2,1:5,:3]"]
    assert part.headers["x-shape"] == "4,3"
    assert part.content == expected.contiguous().view(torch.uint8).numpy().tobytes()
    again = client.get(path, params={"at": "embed"}, headers={"If-None-Match": get(
        client, path, at="embed").headers["etag"]})  # fmt: skip
    assert (again.status_code, again.content) == (304, b"")


def test_tiles_of_a_tensor(client, models):
    run, seen = start(client, "gpt")["run"], models["gpt"].trace(IDS)
    answer = get(client, f"/api/runs/{run}/tensor", at="mlp_out" and "layers.0.mlp_out",
                 reduce="max", to="3,9")  # fmt: skip
    found = np.frombuffer(answer.content, "<f4").reshape(3, 9)
    whole = seen["layers.0.mlp_out"][0].numpy()
    expected = [[whole[r:s, c : c + 4].max() for c in range(0, 36, 4)]
                for r, s in ((0, 2), (2, 4), (4, 7))]  # fmt: skip
    assert (found == np.array(expected, "f4")).all()
    assert answer.headers["x-shape"] == "3,9"
    assert answer.headers["x-reduced"] == "2.33333x4 per cell"


def test_the_same_request_has_the_same_run(client):
    first, again = start(client, "gpt"), start(client, "gpt")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert get(client, f"/api/runs/{first['run']}").json()["ids"] == IDS
    assert start(client, "llama")["run"] != first["run"]


def test_logits_and_a_cell(client, models):
    run, seen = start(client, "gpt")["run"], models["gpt"].trace(IDS)
    found = get(client, f"/api/runs/{run}/logits", row=2, top=4).json()
    row = seen["logits"][0, 2]
    assert [entry["id"] for entry in found["top"]] == row.topk(4).indices.tolist()
    assert found["top"][0]["probability"] == pytest.approx(float(row.softmax(-1).max()), rel=1e-6)
    shares = row.double().softmax(-1)
    assert found["entropy"] == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-6)
    number = get(client, f"/api/runs/{run}/cell", at="layers.1.attn.scores[3,4,1]").json()
    assert number["value"] == float(seen["layers.1.attn.scores[3,4,1]"])
    assert len(number["terms"]) == 8
    masked = get(client, f"/api/runs/{run}/cell", at="layers.1.attn.pattern[3,1,4]").json()
    assert masked["value"] == 0


def test_errors_are_one_line(client):
    run = start(client, "gpt")["run"]
    for path, query, status, words in (
        ("/api/runs/000000000000", {}, 404, "run its prompt again"),
        (f"/api/runs/{run}/tensor", {}, 400, "at is missing"),
        (
            f"/api/runs/{run}/tensor",
            {"at": "layers.0.attn.qq"},
            404,
            "did you mean layers.0.attn.q",
        ),
        (f"/api/runs/{run}/tensor", {"at": "embed[99,0]"}, 404, "no such part"),
        (f"/api/runs/{run}/tensor", {"at": "embed[1"}, 400, "no closing bracket"),
        (f"/api/runs/{run}/tensor", {"at": "embed", "reduce": "min"}, 400, "expected absmax"),
        (
            f"/api/runs/{run}/tensor",
            {"at": "embed", "reduce": "max", "to": "9"},
            400,
            "two numbers",
        ),
        (f"/api/runs/{run}/cell", {"at": "embed[1]"}, 400, "a cell is one number"),
        (f"/api/runs/{run}/logits", {"row": 99}, 404, "tokens 0 to 6"),
    ):
        answer = client.get(path, params=query)
        message = answer.json()["error"]["message"]
        assert (answer.status_code, words in message, "\n" in message) == (status, True, False), (
            message
        )
    for body, status, words in (
        ({"ids": []}, 400, "no tokens"),
        ({"ids": [1] * 65}, 400, "holds 64: shorten it by 1"),
        ({"ids": [1], "prompt": "a"}, 400, "one of the two"),
        ({"ids": [1], "model": "x"}, 404, "there is gpt, llama"),
        ({"ids": [1], "edits": [{"at": "embed", "do": "melt"}]}, 400, "expected one of zero"),
        ({"ids": [1], "edits": [{"at": "nothing", "do": "zero"}]}, 400, "no tensor nothing"),
        (
            {"ids": [1], "edits": [{"at": "embed", "do": "patch", "from": "abc"}]},
            404,
            "no run 'abc'",
        ),
        ({"ids": [1], "surprise": 1}, 400, "unknown field"),
    ):
        answer = client.post("/api/runs", content=json.dumps(body))
        message = answer.json()["error"]["message"]
        assert (answer.status_code, words in message, "\n" in message) == (status, True, False), (
            message
        )


def test_the_page_is_served_whole_and_nothing_else(client, tmp_path):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src" not in page.text
    named = set(re.findall(r'(?:href|src)="(/page/[^"]+)"', page.text))
    assert len(named) > 10
    for path in named:
        answer = client.get(path)
        assert answer.status_code == 200
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert answer.headers["content-type"].startswith(kind[path.rpartition(".")[2]])
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    for wrong in ("/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd"):
        assert client.get(wrong).status_code == 404
    with pytest.raises(ValueError, match="file index.html is missing"):
        PageFiles(tmp_path)
    (tmp_path / "index.html").write_text('<script src="/page/a.js"></script>')
    with pytest.raises(ValueError, match=r"file a\.js is missing .* install pellucid again"):
        PageFiles(tmp_path)


def test_a_key_opens_the_api_and_not_the_page(models):
    rules = Rules(key="secret")
    with served(ServedModel(models["gpt"], "gpt", fast=False), rules=rules) as client:
        assert client.get("/").status_code == 200
        assert client.get("/page/main.js").status_code == 200
        for path in ("/api/models", "/api/runs/x", "/page", "/pages/main.js"):
            assert client.get(path).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert client.get("/api/models", headers=key).json()["models"][0]["name"] == "gpt"


def test_what_leads_to_a_prediction(client, models):
    manifest = start(client, "llama")
    path, seen = f"/api/runs/{manifest['run']}", models["llama"].trace(IDS)
    lens = get(client, f"{path}/lens", top=2).json()
    assert lens["cells"][-1][3]["top"][0]["id"] == int(seen["logits[3]"].argmax())
    parts = get(client, f"{path}/contributions", row=3, id=8).json()
    assert parts["logit"] == pytest.approx(float(seen["logits[3,8]"]), rel=1e-6)
    assert abs(parts["difference"]) < 0.2  # bfloat16
    assert len(get(client, f"{path}/norms").json()["values"]) == 3
    assert len(get(client, f"{path}/heads", layer=1).json()["heads"]) == 4
    turned = get(client, f"{path}/rope", layer=1, head=1, of="k", token=4).json()
    assert turned["pairs"][2]["after"][0] == float(seen["layers.1.attn.k_rotated[1,4,2]"])
    numbers = get(client, f"{path}/statistics", name="layers.1.attn.masked_scores").json()
    assert (numbers["inf"], numbers["nan"]) == (4 * 7 * 6 / 2, 0)
    card = get(client, f"{path}/card", step="layers.1.attn.scores", head=2).json()
    assert "[7,10]" in card["formula"]
    assert all(check["holds"] for check in card["checks"])
    gpt = start(client, "gpt")["run"]
    answer = client.get(f"/api/runs/{gpt}/rope", params={"layer": 1})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        404, "layer 1 has no RoPE: nothing turns there",
    )  # fmt: skip


def test_experiments(client, models):
    clean = start(client, "gpt")
    edits = [{"at": "layers.1.attn.z[2]", "do": "scale", "value": -1.0}]
    edited = start(client, "gpt", edits=edits, like=clean["run"])
    assert (edited["edits"], edited["like"]) == (edits, clean["run"])
    found = get(client, f"/api/runs/{clean['run']}/against/{edited['run']}").json()
    assert found["first"] == "layers.1.attn.z"
    body = {"what": "ablate", "over": "layer,head", "of": "z", "token": 3, "row": -1}
    table = client.post(f"/api/runs/{clean['run']}/sweep", json=body).json()
    assert np.array(table["values"]).shape == (2, 4)
    patched = client.post(f"/api/runs/{clean['run']}/sweep", json={**body, "what": "patch"})
    assert (patched.status_code, "needs the run" in patched.text) == (400, True)
    wrong = client.post(f"/api/runs/{clean['run']}/sweep", json={**body, "over": "all"})
    assert (wrong.status_code, "layer,position or layer,head" in wrong.text) == (400, True)


def test_a_stream_of_tokens_with_their_alternatives(client, models):
    body = {"model": "gpt", "ids": IDS, "max_tokens": 4, "temperature": 0, "alternatives": 3}
    answer = client.post("/api/generate", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]
    assert [event.get("cached") for event in events] == [0, 7, 8, 9, None]
    assert events[-1] == {"done": True, "finish_reason": "length"}
    logits = models["gpt"].trace(IDS)["logits[-1]"]
    assert events[0]["id"] == int(logits.argmax())
    assert [each["id"] for each in events[0]["alternatives"]] == logits.topk(3).indices.tolist()
    drawn = [client.post("/api/generate", json={**body, "temperature": 1, "seed": s}).text
             for s in (1, 1, 2)]  # fmt: skip
    chosen = [re.findall(r'"id": (\d+), "text"', text)[::4] for text in drawn]
    assert chosen[0] == chosen[1] != chosen[2]
    refused = client.post("/api/generate", json={**body, "max_tokens": -1})
    assert (refused.status_code, "\n" in refused.json()["error"]["message"]) == (400, False)


def test_a_client_that_goes_away_frees_the_model(models):
    engine = ServedModel(models["gpt"], "gpt", fast=False)
    with served(engine) as client:
        run = start(client, "gpt")["run"]
        body = {"what": "ablate", "over": "layer,position", "of": "z", "token": 3}
        body["layers"] = [0, 1] * 2000
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"/api/runs/{run}/sweep", json=body, timeout=0.5)
        eventually(lambda: engine.live == 0)
        before = engine.turns
        assert get(client, f"/api/runs/{run}/norms").status_code == 200
        assert engine.turns <= before + 6  # one more of the sweep, which then ends


def test_ids_without_a_text_have_their_number(tmp_path):
    config = replace(GPT, vocab_size=400)  # beyond the tokenizer's
    engine = ServedModel(language_model(config), "padded", fast=False)
    with served(engine) as client:
        answer = client.post("/api/runs", json={"ids": [395, 5]}).json()
        assert (answer["tokens"][0], answer["prompt"][:5]) == ("[395]", "[395]")
        path = f"/api/runs/{answer['run']}"
        texts = {one["text"] for one in get(client, f"{path}/logits", top=400).json()["top"]}
        assert "[399]" in texts


def test_a_run_leaves_as_one_file(client):
    run = start(client, "gpt")["run"]
    answer = get(client, f"/api/runs/{run}/export")
    assert answer.headers["content-disposition"] == f'attachment; filename="pellucid-{run}.html"'
    assert answer.headers["content-type"].startswith("text/html")
    assert f"/api/runs/{run}/tensor?at=layers.1.attn.scores" in answer.text
    assert 'src="/page/' not in answer.text and 'href="/page/' not in answer.text
