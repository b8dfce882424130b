"""The page of a diff: whole without JavaScript, self-contained, safe, and alive in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from pellucid.show import diff_page
from pellucid.show.diff_maps import Maps
from pellucid.show.diff_page import page

EVIL = '"><script>alert(1)</script>&amp;</script><!--'


def row(name, verdict="identical", ratio: float | None = 0.0, **more):
    told = {"where": "", "note": "", "error_a": 1e-8, "error_b": 1e-8 if ratio else 0.0}
    return {"name": name, "verdict": verdict, "ratio": ratio, **told, **more}


def report(**more):
    fault = {
        **row("layers.1.attn.k", "diverged", 2e6, where="kv head 1", error_b=1.2),
        "step": 0,
        "side": "b",
        "cause": {"name": "heads reordered", "evidence": "moved by 1: replayed"},
        "tried": [
            {"cause": "eps", "evidence": "1e-6", "error": 0.5, "fits": False},
            {"cause": "heads reordered", "evidence": EVIL, "error": 1e-8, "fits": True},
        ],
    }
    side = {"label": EVIL, "dtype": "float32", "dialect": "hf", "family": "llama", "n_layers": 2}
    side |= {"width": 8, "parameters": 21, "recorded": False, "explained": ""}
    return {
        "a": EVIL,
        "b": "b",
        "verdict": "diverged",
        "tokens": [[1, 2, 3]],
        "encoded": True,
        "sides": [side, {**side, "label": "b"}],
        "static": [
            {
                "stage": "weights",
                "name": "layers.1.attn.k_proj.weight",
                "finding": EVIL,
                "cause": "heads reordered",
                "kind": "fault",
            }
        ],
        "first": fault,
        "cause": fault["cause"],
        "faults": [fault],
        "tensors": [
            row("embed"),
            row("layers.0.attn.k", "within-rounding", 0.4),
            row("layers.1.attn.k", "diverged", 2e6, where="kv head 1", error_b=1.2),
            row("layers.1.attn.z", "diverged", None, note=EVIL, error_b=None),
            row("step.1.embed", "not-judged", note="needs tokens"),
            row("logits", "explained", 0.9),
        ],
        "not_observed": ["layers.0.attn.scores", "layers.1.attn.scores"],
        "effect": {"kl_mean": 0.1, "kl_max": None, "top1": 0.5},
        "note": EVIL,
        **more,
    }


def maps():
    kept = Maps()
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for name in ("layers.0.attn.k", "layers.1.attn.k"):
        kept.keep(name, x, x + 0.5 * name.startswith("layers.1"))
    return kept.pairs


class Reader(HTMLParser):
    """Tags that were opened and closed, what is loaded, the text outside of script and style."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.ids, self.links, self.words = [], [], [], [], []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loaded += [given[key] for key in ("src", "srcset", "data") if key in given]
        self.loaded += [given["href"]] if tag == "link" else []
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def data_of(text):
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


def test_the_page_is_whole_without_javascript():
    read = Reader(page(report(), maps()))
    assert read.open == []
    words = " ".join(read.words)
    for told in (
        "Diverged",
        "KL(A ‖ B) 0.1 nats on average",
        "heads reordered",
        "kv head 1",
        "2 replays tried",
        "layers.*.attn.scores",
        "not observed",
    ):
        assert told in words
    names = [entry["name"] for entry in report()["tensors"]]
    assert [found for found in read.ids if found not in ("detail", "data")] == names
    assert {link.removeprefix("#") for link in read.links} == set(names)


def test_nothing_is_loaded_and_nothing_escapes():
    text = page(report(), maps())
    read = Reader(text)
    assert read.loaded == []
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert read.scripts == 2  # the data and the page's own
    assert EVIL not in text
    assert EVIL in " ".join(read.words)
    assert data_of(text)["tensors"]["layers.1.attn.z"]["note"] == EVIL


def test_pictures_stay_within_the_budget(monkeypatch):
    data = data_of(page(report(), maps()))["tensors"]
    assert data["layers.0.attn.k"]["picture"] and data["layers.1.attn.k"]["picture"]
    assert "reference" not in data["layers.0.attn.k"]["picture"]  # equal: told once
    assert "picture" not in data["embed"]  # never kept
    monkeypatch.setattr(diff_page, "MAPS_BYTES", 100)
    data = data_of(page(report(), maps()))["tensors"]
    assert data["layers.1.attn.k"]["picture"]  # 3 × 24 bytes: what diverged comes first
    assert data["layers.0.attn.k"]["picture"] is None


def test_a_healthy_report_has_no_faults():
    healthy = report(verdict="identical", static=[], first=None, cause=None, faults=[], note="")
    healthy["tensors"] = [row("embed"), row("logits")]
    healthy["not_observed"] = []
    read = Reader(page(healthy, {}))
    words = " ".join(read.words)
    assert "Identical" in words and "every observed tensor is equal in every bit" in words
    assert "Faults" not in words and "FIRST" not in words and "Not observed" not in words
    assert data_of(page(healthy, {}))["first"] is None


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_script_opens_the_first_fault(tmp_path):
    path = tmp_path / "diff.html"
    path.write_text(page(report(), maps()), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    detail = shown.split('<section id="detail"', 1)[1].split("</section>", 1)[0]
    assert not detail.split(">", 1)[0].rstrip().endswith('hidden=""')
    assert "<code>layers.1.attn.k</code>" in detail
    assert detail.count("<canvas") == 3 * 2  # R, B and the error of two heads
    assert "Largest error: kv head" in detail or "Largest error: head" in detail
    assert '<details class="tried"' in detail
    assert 'class="diverged chosen"' in shown
