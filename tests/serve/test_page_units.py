"""The page's own modules, run in a browser: signals, templates, addresses, numbers, colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pellucid.serve.page_files as page_files
from pellucid.serve.page_files import PageFiles

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def tab(chromium):
    """A tab with the page's modules and no server behind them."""
    root = page_files.files("pellucid.serve") / "page"

    def answer(route: Any) -> None:
        name = route.request.url.split("/page/")[-1]
        kind = "text/javascript" if name.endswith(".js") else "text/html"
        body = (root / name).read_text() if name.endswith(".js") else "<body></body>"
        route.fulfill(body=body, content_type=kind)

    page = chromium.new_page()
    page.route("**/*", answer)
    page.goto("http://page.test/")
    yield page
    page.close()


def run(tab: Any, module: str, body: str, argument: Any = None) -> Any:
    """What a piece of JavaScript returns that sees a module as `m` and an argument as `given`."""
    script = f"([path, given]) => import(path).then(async m => {{ {body} }})"
    return tab.evaluate(script, [f"/page/{module}", argument])


def test_an_effect_runs_once_for_a_batch_and_sees_no_half_change(tab):
    assert run(tab, "signals.js", """
        const a = m.signal(1), b = m.signal(2), seen = [];
        const sum = m.computed(() => a.value + b.value);
        const stop = m.effect(() => { seen.push([a.value, sum.value]); });
        m.batch(() => { a.value = 10; b.value = 20; });
        a.value = 11;
        stop();
        a.value = 12;
        return seen;""") == [[1, 3], [10, 30], [11, 31]]  # fmt: skip


def test_a_computed_value_that_stays_equal_stops_the_change(tab):
    assert run(tab, "signals.js", """
        const a = m.signal(1); let worked = 0, ran = 0;
        const odd = m.computed(() => { worked++; return a.value % 2; });
        m.effect(() => { ran++; odd.value; });
        a.value = 3; a.value = 5;
        const before = [worked, ran];
        a.value = 6;
        return [...before, worked, ran];""") == [3, 1, 4, 2]  # fmt: skip


def test_what_an_effect_made_ends_before_it_runs_again(tab):
    assert run(tab, "signals.js", """
        const a = m.signal(0), b = m.signal(0), log = [];
        const end = m.scope(() => m.effect(() => {
          const outer = a.value;
          m.effect(() => { log.push([outer, b.value]); });
          return () => log.push("end " + outer);
        }));
        b.value = 1; a.value = 1; b.value = 2; end(); a.value = 2; b.value = 3;
        return log;""") == [[0, 0], [0, 1], "end 0", [1, 1], [1, 2], "end 1"]  # fmt: skip


def test_reads_are_followed_anew_at_each_run(tab):
    assert run(tab, "signals.js", """
        const which = m.signal(true), a = m.signal("a"), b = m.signal("b"), seen = [];
        m.effect(() => { seen.push(which.value ? a.value : b.value); });
        b.value = "B"; which.value = false; a.value = "A"; b.value = "BB";
        return seen;""") == ["a", "B", "BB"]  # fmt: skip


def test_an_endless_change_is_an_error_and_not_a_hang(tab):
    assert "keep changing" in run(tab, "signals.js", """
        const a = m.signal(0);
        try { m.effect(() => { a.value = a.value + 1; }); } catch (error) { return error.message; }
        return "nothing";""")  # fmt: skip


def test_text_in_a_template_never_becomes_markup(tab):
    hostile = '<img src=x onerror="window.bad=1"></script>&amp;'
    found = run(tab, "html.js", """
        const one = m.html`<p title=${given} lang=${given}>${given}${[given, null, false, 0]}</p>`;
        return [one.textContent, one.title, one.children.length, one.outerHTML.includes("<img")];
        """, hostile)  # fmt: skip
    assert found == [hostile + hostile + "0", hostile, 0, False]


def test_templates_follow_signals_and_keep_the_case_of_svg(tab):
    assert run(tab, "html.js", """
        const { signal } = await import("/page/signals.js");
        const n = signal(1);
        const line = m.svg`<path d=${() => "M0 " + n.value}></path>`;
        const one = m.html`<svg viewBox=${"0 0 2 2"}>${line}</svg>`;
        const text = m.html`<p hidden=${() => n.value > 1}>n is ${n}, ${() => n.value * 2}</p>`;
        n.value = 4;
        const path = one.firstElementChild;
        return [one.getAttribute("viewBox"), path.getAttribute("d"), path.namespaceURI,
          text.textContent, text.hidden];
        """) == ["0 0 2 2", "M0 4", "http://www.w3.org/2000/svg", "n is 4, 8", True]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["logits", "layers.3.attn.scores[5,7,3]", "mask[0,:3]", "x[2:5,4]"]
)
def test_addresses_survive_reading_writing_and_the_url(tab, text):
    assert run(tab, "address.js", """
        const { name, index } = m.parse(given);
        const options = { view: "walk" };
        const hash = m.toHash({ model: "org/a model", run: "ab12", address: given, options });
        return [m.format(name, index), m.fromHash(hash).address, m.fromHash(hash).model];
        """, text) == [text, text, "org/a model"]  # fmt: skip


@pytest.mark.parametrize("text", ["", "a b", "x[1", "x[a]", "x[1,,2]", "../x", "x[-1]"])
def test_what_is_no_address_is_said_in_one_line(tab, text):
    said = run(tab, "address.js", "try { m.parse(given); } catch (e) { return e.message; }", text)
    assert said and "\n" not in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_read_bit_for_bit_and_written_shortest(tab, dtype):
    values = torch.tensor([0.1, -1.914, 3.4e-5, 65504.0, 0.0, 1 / 3, -2.0, 6e-8]).to(dtype)
    values = torch.cat([values, torch.tensor([float("inf"), float("nan")], dtype=dtype)])
    name = str(dtype).removeprefix("torch.")
    data = list(values.view(torch.uint8).numpy().tobytes())
    read, texts = run(tab, "data/tensors.js", """
        const { exact } = await import("/page/data/numbers.js");
        const found = [...m.decode(new Uint8Array(given[0]).buffer, given[1])];
        return [found.map(String), found.map(v => exact(v, given[1]))];""",
        [data, name])  # fmt: skip
    assert np.array_equal(np.array(read, float), values.double().numpy(), equal_nan=True)
    back = torch.tensor([float(text) for text in texts], dtype=torch.float64).to(dtype)
    assert torch.equal(back.nan_to_num(7), values.nan_to_num(7))
    if dtype is torch.float32:  # numpy's shortest text is no longer than ours
        plain = [repr(float(str(v))) for v in values.numpy()[:8]]
        assert all(float(a) == float(b) for a, b in zip(texts, plain, strict=False))


def test_colours_are_ordered_by_lightness_and_zero_is_paper(tab):
    for dark in (False, True):
        light = run(tab, "data/scale.js", """
            const one = p => { const c = m.table(p, given);
              return [...c].map(x =>
                0.299 * (x & 255) + 0.587 * ((x >> 8) & 255) + 0.114 * ((x >> 16) & 255)); };
            return [one("share"), one("size"), one("signed")];""", dark)  # fmt: skip
        direction = 1 if dark else -1
        for rising in (light[0], light[1], light[2][128:], light[2][127::-1]):
            steps = np.diff(rising) * direction
            assert (steps >= -0.6).all(), "lightness alone must order the scale"
            assert abs(rising[-1] - rising[0]) > 120


@pytest.mark.parametrize("bend", ["lin", "sym", "log"])
def test_a_scale_and_its_inverse_agree(tab, bend):
    found = run(tab, "data/scale.js", """
        const how = { palette: "signed", dark: false, bend: given, limit: 50, knee: 0.5 };
        const s = new m.Scale(how);
        return [0.2, 0.5, 0.8, 1].map(x => s.strength(s.valueAt(x)))
          .concat([s.pixel(-Infinity), s.index(0), s.index(60), s.index(-60)]);""",
        bend)  # fmt: skip
    assert found[:4] == pytest.approx([0.2, 0.5, 0.8, 1])
    assert found[4] == 0 and found[5] in (127, 128) and found[6:] == [255, 0]


def test_the_server_refuses_to_start_without_a_module(tmp_path):
    (tmp_path / "index.html").write_text('<script src="/page/absent.js"></script>')
    with pytest.raises(ValueError, match="absent.js"):
        PageFiles(tmp_path)
