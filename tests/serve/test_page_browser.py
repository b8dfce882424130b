"""The page in a real browser, against the trace: pixels, numbers, keys, links, failures."""

from __future__ import annotations

import random
import re
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from browsing import PHONE, PROMPT, Reader

from pellucid.serve.page_files import PageFiles

pytestmark = pytest.mark.browser
QUERY = f"view=walk&prompt={quote(PROMPT)}"
ROOMS = ("map", "walk", "heads", "lens", "parts", "generate", "try", "compare")


@pytest.fixture(scope="module")
def seen(demo_lm):
    return demo_lm.trace(PROMPT)


def stops(palette: str) -> np.ndarray:
    """The light colours of a palette, as the page's file states them."""
    text = PageFiles().held["data/scale.js"].decode()
    found = re.search(rf"const {palette.upper()} = {{\s*light: \[(.*?)\]", text, re.S)
    return np.array(
        [[int(h[i : i + 2], 16) for i in (1, 3, 5)] for h in re.findall(r"#\w{6}", found[1])]
    )


def colour(value: float, limit: float, palette: str) -> np.ndarray:
    """The colour of a value on a linear scale, worked out anew."""
    share = np.clip(value / limit, -1 if palette == "signed" else 0, 1)
    place = round((127.5 + 127.5 * share) if palette == "signed" else 255 * share) / 255
    colours = stops(palette)
    return np.array(
        [np.interp(place * (len(colours) - 1), range(len(colours)), c) for c in colours.T]
    )


CASES = [
    ("layers.1.attn.scores", 3, "signed"), ("layers.2.attn.pattern", 5, "share"),
    ("layers.0.attn.k", 1, "signed"), ("layers.3.resid_post", None, "signed"),
    ("embed", None, "signed"),
]  # fmt: skip


@pytest.mark.parametrize("name, head, palette", CASES)
def test_a_pixel_is_the_traces_number(reader, seen, name, head, palette):
    values = (seen[name][0] if head is None else seen[name][0, head]).float().numpy()
    at = name if head is None else f"{name}[{head}]"
    reader.go(f"#/demo//{at}?{QUERY}&scale=lin&head={3 if name.endswith('.k') else head or 0}")
    limit = float(np.abs(values[np.isfinite(values)]).max())
    chance = random.Random(name)
    cells = [[chance.randrange(n) for n in values.shape] for _ in range(12)]
    pixels = reader.tab.evaluate(
        """cells => { const map = document.querySelector("main canvas.grid").heatmap;
        const aside = size => (size > 12 ? size / 2 - 4 : 0); // of the number in the middle
        return cells.map(([row, col]) => {
          const [x, y] = map.pointOf(row, col).map((at, axis) =>
            (at - aside(axis ? map.view.sy : map.view.sx)) * devicePixelRatio);
          return [...map.context.getImageData(x, y, 1, 1).data]; }); }""",
        cells,
    )  # fmt: skip
    for (row, col), (*found, _) in zip(cells, pixels, strict=True):
        if palette == "share" and values[row, col] == 0:
            continue  # hatched
        wanted = colour(float(values[row, col]), limit, palette)
        assert np.abs(found - wanted).max() <= 1.5, (name, row, col, values[row, col])


@pytest.mark.parametrize(
    "address",
    ["layers.1.attn.scores[3,4,2]", "layers.2.attn.pattern[5,6,1]", "layers.0.mlp_norm[2,77]",
     "layers.3.mlp.hidden[5,300]", "layers.2.attn.q_rotated[4,3,9]", "embed[1,5]", "logits[6,400]"],
)  # fmt: skip
def test_the_microscope_says_the_traces_number(reader, seen, address):
    reader.go(f"#/demo//{address}?{QUERY}")
    said = reader.tab.get_attribute(".microscope .value", "data-value")
    value = seen[address]
    assert torch.tensor(float(said), dtype=torch.float64).to(value.dtype) == value
    assert address in reader.tab.inner_text(".microscope")
    bits = int(reader.tab.inner_text(".microscope .bits code"), 16)
    kind = torch.int16 if value.dtype == torch.bfloat16 else torch.int32
    assert bits == value.reshape(1).view(kind).item() % (1 << (8 * value.element_size()))
    assert reader.state("live").endswith(said)


def test_every_step_and_every_picture_of_it_shows_without_a_complaint(reader):
    reader.go(f"#/demo//tokens?{QUERY}&layer=2")
    count = len(reader.tab.query_selector_all(".ledger [data-step]"))
    assert count > 25
    drawn = set()
    for _ in range(count):
        step = reader.state("step")
        kind = (step["kind"], tuple(step["dims"]), step["dtype"])
        for key in "" if kind in drawn else "2341":
            reader.tab.keyboard.press(key)
            reader.settle()
        drawn.add(kind)
        assert reader.tab.inner_text(".what h1").strip()
        reader.tab.keyboard.press("j")
        reader.settle()
    assert reader.state("step")["id"] == "logits"


def test_every_room_opens_by_its_url_and_is_there_again(chromium, reader, url):
    again = Reader(chromium, url)
    reader.go(f"#/demo//layers.2.attn.pattern[3,5,2]?{QUERY}&scale=log")
    again.open()
    for room in ROOMS:
        reader.tab.click(f".rooms button >> nth={ROOMS.index(room)}")
        reader.settle()
        hash = reader.tab.evaluate("location.hash")
        again.tab.evaluate("hash => { location.hash = hash; }", hash)
        again.tab.wait_for_function("hash => location.hash === hash", arg=hash)
        again.settle()
        assert again.state("room") == room
        for name in ("address", "head", "layer", "token", "bend", "prompt", "cell"):
            assert again.state(name) == reader.state(name), (room, name)
        assert again.state("run")["run"] == reader.state("run")["run"]
        assert again.tab.evaluate("location.hash") == hash
    assert again.complaints == []
    again.context.close()


def test_back_and_forward_and_an_edited_address(reader):
    reader.go(f"#/demo//layers.0.attn.q[2]?{QUERY}")
    reader.tab.click("[data-step='layers.0.attn.scores']")
    reader.settle()
    reader.tab.go_back()
    reader.tab.wait_for_function(
        "document.querySelector('#address').value === 'layers.0.attn.q[2]'"
    )
    reader.tab.fill("#address", "layers.3.attn.pattern[1,4,2]")
    reader.tab.press("#address", "Enter")
    reader.settle()
    assert reader.state("layer") == 3 and reader.state("head") == 1 and reader.state("token") == 4
    reader.tab.fill("#address", "layers.3.attn.pattern[1,400,2]")
    reader.tab.press("#address", "Enter")
    assert "has the shape" in reader.tab.inner_text(".notice.bad")


def test_the_keyboard_reaches_everything_and_speaks(reader, seen):
    reader.go(f"#/demo//layers.1.attn.scores[0]?{QUERY}")
    press = reader.tab.keyboard.press
    press("]"), press("ArrowUp"), press("ArrowLeft")
    assert (reader.state("head"), reader.state("layer")) == (1, 2)
    row = reader.state("token")
    press("Enter"), press("ArrowRight"), press("ArrowRight"), press("ArrowUp")
    reader.settle()
    cell = reader.state("cell")
    assert cell == {"row": row - 1, "col": 1}
    value = seen[f"layers.2.attn.scores[1,{cell['row']},1]"]
    spoken = reader.tab.inner_text("#live")
    query, key, number = re.fullmatch(r"query (\d+) '.*', key (\d+) '.*', (.*)", spoken).groups()
    assert (int(query), int(key)) == (cell["row"], 1)
    assert torch.tensor(float(number)).to(value.dtype) == value
    canvas = reader.tab.locator("main canvas.grid")
    assert canvas.get_attribute("role") == "grid" and canvas.get_attribute("aria-label")
    press("Escape"), reader.tab.locator("body").press("?")
    assert "next step" in reader.tab.inner_text("dialog")
    press("Escape"), press("g"), press("l")
    assert reader.state("room") == "lens"
    press("Control+k")
    reader.tab.keyboard.type("layers.0 pattern")
    press("Enter")
    assert reader.state("step")["id"] == "layers.0.attn.pattern"


def test_a_tap_reads_a_value_on_a_phone_and_nothing_sticks_out(chromium, url, seen):
    phone = Reader(chromium, url, **PHONE)
    phone.open(f"#/demo//layers.1.attn.scores[2]?{QUERY}")
    for room in reversed(ROOMS):
        phone.tab.locator(f".rooms button >> nth={ROOMS.index(room)}").tap()
        phone.settle()
        assert phone.tab.evaluate("document.documentElement.scrollWidth") <= 390, room
    phone.tab.locator(".rooms button >> nth=1").tap()
    phone.settle()
    canvas = phone.tab.locator("main canvas.grid")
    canvas.scroll_into_view_if_needed()
    x, y = canvas.evaluate("canvas => canvas.heatmap.pointOf(3, 1)")
    canvas.tap(position={"x": x, "y": y})
    phone.settle()
    assert phone.state("cell") == {"row": 3, "col": 1}
    said = float(phone.tab.inner_text(".tip").rsplit(", ", 1)[1])
    value = seen["layers.1.attn.scores[2,3,1]"]
    assert torch.tensor(said).to(value.dtype) == value
    assert phone.complaints == []
    phone.context.close()


def test_nothing_sticks_out_of_a_narrow_window(chromium, url):
    """A notebook's frame, half a screen: wider than a phone and narrower than most windows."""
    one = Reader(chromium, url)
    one.open(f"#/demo//layers.1.attn.scores[2]?{QUERY}")
    for room in ROOMS:
        one.tab.locator(f".rooms button >> nth={ROOMS.index(room)}").click()
        one.settle()
        for width in (780, 965, 1100, 1180):
            one.tab.set_viewport_size({"width": width, "height": 800})
            assert one.tab.evaluate("document.documentElement.scrollWidth") <= width, (room, width)
    one.context.close()


def test_dark_light_and_stillness(chromium, url):
    one = Reader(chromium, url, color_scheme="dark", reduced_motion="reduce")
    one.open(f"#/demo//layers.1.attn.q_rotated[2]?{QUERY}")
    one.settle()
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = one.tab.evaluate(paper)
    one.tab.keyboard.press("t")
    assert one.tab.evaluate(paper) != dark
    assert one.complaints == []
    one.context.close()


def test_failures_say_what_to_do(chromium, url):
    one = Reader(chromium, url)
    one.open(f"#/demo/000000000000/layers.1.attn.scores[2]?{QUERY}")
    one.settle()
    assert one.state("address") == "layers.1.attn.scores[2]", "a dropped run is run again"
    one.tab.fill("#prompt", "word " * 400)
    one.tab.press("#prompt", "Enter")
    one.tab.wait_for_selector(".notice.bad")
    assert "256" in one.tab.inner_text(".notice.bad")
    assert one.state("address") == "layers.1.attn.scores[2]", "the last picture stays"
    one.tab.route("**/api/**", lambda route: route.abort())
    one.tab.route("**/health", lambda route: route.abort())
    one.tab.keyboard.press("Escape")
    one.tab.locator("body").press("j")
    gone = ".notice.bad >> text=The server does not answer"
    one.tab.wait_for_selector(gone)
    assert one.tab.is_visible("main canvas.grid")
    one.tab.unroute("**/api/**"), one.tab.unroute("**/health")
    one.tab.wait_for_selector(gone, state="hidden", timeout=8000)
    one.settle()
    assert "does not answer" not in one.tab.inner_text("main"), "all is asked for again"
    one.open("#/another-model//embed?view=walk")
    assert "pellucid serve another-model" in one.tab.inner_text(".notice.bad")
    assert all("Failed to load resource" in said for said in one.complaints)
    one.context.close()


def test_masked_cells_have_no_colour_and_nan_is_checkered(reader: Any):
    reader.go(f"#/demo//layers.1.attn.masked_scores[2]?{QUERY}")
    colours = reader.tab.evaluate("""async () => {
        const { Scale } = await import("/page/data/scale.js");
        const s = new Scale({ palette: "signed", dark: false, bend: "lin", limit: 1, knee: 1 });
        const pixels = new Uint32Array(6);
        s.paint(Float32Array.from([-Infinity, NaN, NaN, -3.4e38, 1, -1]), pixels, 3);
        return [...pixels]; }""")
    assert colours[0] == colours[3] == 0
    assert colours[1] != colours[2] and len(set(colours)) == 5


VALUES = """() => [...document.querySelectorAll("main canvas.grid")].map(({ heatmap: { plane } }) =>
    [...Array(plane.rows).keys()].map(row =>
      [...Array(plane.cols).keys()].map(col => plane.value(row, col))))"""


def test_two_models_beside_each_other_with_their_difference(reader, seen, changed_lm):
    other = changed_lm.trace(PROMPT)
    rival = quote('{"model":"changed","prompt":null,"edits":[],"run":""}')
    address = "layers.2.attn.v[1,4,3]"
    place = f"#/demo//{address}?{QUERY.replace('walk', 'compare')}&head=3&rival={rival}"
    reader.go(place)
    name = address.partition(",")[0] + "]"
    a, b = seen[name].double(), other[name].double()
    shown = [torch.tensor(part, dtype=torch.float64) for part in reader.tab.evaluate(VALUES)]
    assert len(shown) == 3
    for found, wanted in zip(shown, (a, b, b - a), strict=True):
        assert torch.equal(found, wanted)
    cells = [reader.tab.get_attribute(f".both td >> nth={i}", "data-value") for i in range(3)]
    read = [torch.tensor(float(text), dtype=torch.float64) for text in cells]
    assert [read[0].bfloat16(), read[1].bfloat16()] == [seen[address], other[address]]
    assert float(read[2]) == float(b[4, 3] - a[4, 3])
    own = reader.tab.locator("[data-verdict='own']:not(i)")
    assert [own.nth(i).get_attribute("aria-label").split(":")[0] for i in range(own.count())] == [
        "layers.2.attn.v"
    ]
    assert "first difference: layers.2.attn.v" in reader.tab.inner_text(".verdict")
    assert "second = lm.trace(" in reader.tab.inner_text("pre.repeat")
    hash = reader.tab.evaluate("location.hash")
    reader.go("#/demo")
    reader.go(hash)
    assert reader.state("room") == "compare" and reader.state("rival")["model"] == "changed"
    reader.tab.click("text=demo-gpt2 >> nth=-1")
    reader.settle()
    assert len(reader.tab.evaluate(VALUES)) == 2
    assert "nothing to subtract" in reader.tab.inner_text(".beside3")
    reader.tab.locator("body").press("j"), reader.settle()
    assert reader.state("room") == "compare", "steps go on inside the room"


def test_an_experiment_says_before_and_after_in_that_order(reader, demo_lm, seen):
    edits = quote('[{"at":"layers.1.attn.z[2]","do":"zero"}]')
    reader.go(f"#/demo//embed?{QUERY.replace('walk', 'try')}")
    reader.go(f"#/demo//embed?{QUERY.replace('walk', 'try')}&edits={edits}")

    def silence(z):
        z[:, 2] = 0
        return z

    silent = demo_lm.trace(PROMPT, edit={"layers.1.attn.z": silence})
    row = reader.tab.locator(".pairs li").first
    id = int(row.locator("small").inner_text())
    shown = [
        float(text.replace("%", "")) / 100 for text in row.locator(".number").all_inner_texts()
    ]
    wanted = [float(each["logits"][0, -1].float().softmax(-1)[id]) for each in (seen, silent)]
    assert shown == pytest.approx(wanted, rel=0.01)
    kinds = reader.tab.locator("[data-verdict='own']:not(i)")
    assert kinds.first.get_attribute("aria-label").startswith("layers.1.attn.z:")
