"""The viewer in a real browser: the page from a file, and the tab in TensorBoard. Skipped without a browser.

Playwright is found if it is installed (`pip install playwright`), and with it its own Chromium or the system's.
"""

import base64
import csv
import io
import json
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
import torch
from helpers import NASTY, maps_of

import minitf
from minitf import edits
from minitf.benchmark.browser import chromium
from minitf.errors import Unavailable
from minitf.interpretability.attention_maps import attention_maps
from minitf.interpretability.interventions import Reader
from minitf.interpretability.page import attention_page
from minitf.interpretability.patching import patch
from minitf.interpretability.residual import contributions, lens
from minitf.viewer import viewer_page

pytestmark = pytest.mark.browser

# Elements a hover may add: the note at the pointer and the bold words of a sentence.
ADDED_PER_HOVER = 12
VIEWS = ("lines", "matrix", "three_steps", "next_token", "over_training", "compare")
PROBES = ("lens", "contributions", "patch")  # views that ask the model
MEASURE = (Path(__file__).parent / "measure.js").read_text(encoding="utf-8")
READ = ("textarea", ".reading .sentence", ".readout", ".effect")  # typed, and said about it
LAPTOP = {"width": 1366, "height": 650}  # what a laptop leaves of a window


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            launched = stack.enter_context(chromium())
        except Unavailable as error:
            pytest.skip(str(error))
        yield launched


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty page on which any error fails the test."""
    context = browser.new_context(viewport=LAPTOP, locale="en-US", accept_downloads=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("response", lambda reply: problems.append(f"{reply.status} {reply.url}") if _is_refused(reply) else None)
    page.on("request", lambda request: None if _is_own(request.url) else problems.append(f"asked for {request.url}"))
    yield page
    context.close()
    # TensorBoard lacks some of its own files, such as icons; those the tab requests must exist.
    assert not [problem for problem in problems if not problem.startswith("Failed to load resource")]


def _is_refused(reply: Any) -> bool:
    """Apart from replies to typed sentences: too long (422), and busy (503), after which the tab asks again."""
    return bool(reply.status >= 400 and reply.status not in (422, 503) and "minitf_attention" in reply.url)


def _is_own(url: str) -> bool:
    return url.startswith(("file://", "data:", "blob:", "http://localhost:"))


def open_page(page: Any, tmp_path: Path, content: str, address: str = "") -> None:
    (tmp_path / "attention.html").write_text(content, encoding="utf-8")
    page.goto(f"file://{tmp_path}/attention.html{address}")
    page.wait_for_selector(".thumb")


def show(page: Any, view: str) -> None:
    page.click(f'.tabs [data-key="{view}"]')
    page.wait_for_selector(f'.tabs [data-key="{view}"][aria-selected="true"]')


# ---------------------------------------------------------------------------------------------------------------------
# One screen


def assert_one_screen(frame: Any, thumbs: int) -> None:
    """All parts lie within the window, the view has at least 320 pixels, and every head can be hit."""
    found = frame.evaluate(f"() => {{ {MEASURE}; return inside(); }}")
    width, height = found["window"]
    assert found["scrolls"] <= 0
    for name, boxes in found["parts"].items():
        assert len(boxes) == 1, name
        left, top, right, bottom = boxes[0]
        assert (left >= 0, top >= 0, right <= width, bottom <= height) == (True,) * 4, (name, boxes[0])
    top, bottom = found["parts"][".panel"][0][1::2]
    assert bottom - top >= 320
    query, sentence = found["parts"][".token.query"][0], found["parts"][".sentence"][0]
    assert sentence[1] <= query[1]
    assert query[3] <= sentence[3] + 1
    assert len(found["thumbs"]) == thumbs
    for left, top, right, bottom in found["thumbs"]:
        assert right - left >= 24
        assert bottom - top >= 24
        assert (right <= width, bottom <= height) == (True, True)


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(12, 12, 130), (30, 9, 30), (2, 4, 130)])
def test_everything_is_on_one_screen(page: Any, tmp_path: Path, layers: int, heads: int, tokens: int) -> None:
    words = [f" word{i}" for i in range(tokens)]
    maps = maps_of(words, layers, heads)
    open_page(page, tmp_path, attention_page([replace(maps, step=step) for step in (0, 5)], "many"))
    for view in VIEWS:
        if page.locator(f'.tabs [data-key="{view}"]').is_visible():
            show(page, view)
            assert_one_screen(page, layers * heads)


def test_all_tabs_fit_on_one_line(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    tabs = "[...document.querySelectorAll('.tabs button')]"
    for _ in ("en", "zh"):
        page.evaluate(f"() => {tabs}.forEach((tab) => {{ tab.hidden = false; }})")
        tops = page.evaluate(f"() => {tabs}.map((tab) => tab.getBoundingClientRect().top)")
        assert len(tops) == 10
        assert len(set(tops)) == 1
        page.click(".language")


def test_the_slider_changes_the_view_one_looks_at(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    show(page, "matrix")
    image = "() => document.querySelector('.panel canvas').toDataURL()"
    last = page.evaluate(image)
    page.focus(".timeline input")
    page.keyboard.press("Home")
    page.wait_for_function("() => document.querySelector('.losses b').textContent === 'step 0'")
    assert page.evaluate(image) != last
    assert "training loss –" in page.inner_text(".losses")  # no loss was measured at step 0
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".losses b") == "step 3"
    assert_one_screen(page, 8)


def test_three_steps_names_the_formula_of_a_variant(page: Any, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(tokenizer.vocab_size, variant="off_by_one")
    maps = attention_maps(model, tokenizer, "The cat sat on the mat.")
    open_page(page, tmp_path, attention_page([maps], "variant"))
    show(page, "three_steps")
    note = page.inner_text(".three-steps .warning")
    assert maps.formula in note
    assert "need not add up to 100 %" in note
    (shown,) = re.findall(r"\d+(?=%)", page.inner_text(".steps-table .output td"))
    assert 0 < int(shown) < 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_opens_without_network(page: Any, trained_run: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.context.set_offline(True)
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    assert page.locator(".attention-viewer").get_attribute("data-theme") == scheme
    for _ in ("en", "zh"):
        for view in VIEWS:
            show(page, view)
            assert page.locator(".panel").bounding_box()["height"] >= 320
        page.click(".language")
    page.keyboard.press("?")
    assert "Stored maps hold weights in 8 bits" in page.inner_text("dialog")


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def test_the_value_of_a_cell_stands_at_the_pointer(page: Any, tmp_path: Path) -> None:
    maps = maps_of(["the", " cat", " sat", " on", " it"])
    open_page(page, tmp_path, attention_page([maps], "title"))
    show(page, "matrix")
    page.click('.thumb[aria-label^="Layer 1, head 2"]')
    box = page.locator(".plot canvas").bounding_box()
    for query in range(5):
        for key in range(query + 1):
            x, y = (box["x"] + (key + 0.5) * box["width"] / 5, box["y"] + (query + 0.5) * box["height"] / 5)
            page.mouse.move(x, y)
            words, share = page.inner_text(".tooltip").split("\n")
            assert abs(float(share.rstrip("%")) / 100 - float(maps.weights_LHTS[1, 2, query, key])) <= 1 / 255
            assert words == f"“{maps.tokens[query].strip()}” → “{maps.tokens[key].strip()}”"
            note = page.locator(".tooltip").bounding_box()
            assert max(abs(note["x"] - x), abs(note["y"] - y)) < 250
            assert f"“{maps.tokens[key].strip()}” (key)" in page.inner_text(".readout")


def test_a_cell_among_130_tokens_has_words_and_a_value(page: Any, tmp_path: Path) -> None:
    open_page(page, tmp_path, attention_page([maps_of([f" w{i}" for i in range(130)])], "long"))
    show(page, "matrix")
    box = page.locator(".plot canvas").bounding_box()
    page.mouse.move(box["x"] + 20.5 * box["width"] / 130, box["y"] + 100.5 * box["height"] / 130)
    assert page.inner_text(".tooltip").startswith("“w100” → “w20”\n")
    assert page.locator(".matrix .name.active").all_inner_texts() == ["w20", "w100"]


def test_several_heads_say_which_is_which(page: Any, tmp_path: Path) -> None:
    open_page(page, tmp_path, attention_page([maps_of(["a", "b", "c", "d"], 2, 4)], "several"))
    page.check(".overview input[type=checkbox]")
    for head in range(4):
        page.click(f'.thumb[aria-label^="Layer 0, head {head}"]')
    for head in range(4):
        page.click(f'.thumb[aria-label^="Layer 1, head {head}"]')
    assert page.locator('.thumb[aria-pressed="true"]').count() == 6
    assert "At most 6 heads" in page.inner_text(".toast")
    shares = page.locator(".lines ol >> nth=1").locator("li").first.inner_text()
    assert shares.count("%") >= 4  # of each head that looks there, in its colour
    show(page, "matrix")
    box = page.locator(".plot canvas").first.bounding_box()
    page.mouse.move(box["x"] + 4, box["y"] + box["height"] - 4)
    assert len(page.inner_text(".tooltip").split("\n")) == 7
    bars = page.evaluate("[...document.querySelectorAll('.token small i')].map((bar) => bar.offsetHeight)")
    assert max(bars) >= 6  # of random weights among four words
    assert page.inner_text(".readout").startswith("Layer ")


def test_a_page_of_one_map_says_what_it_is_of(page: Any, tmp_path: Path) -> None:
    open_page(page, tmp_path, attention_page([maps_of(["a", "b"])], "Attention of runs/x, step 3", "sentence"))
    assert page.inner_text("h1") == "Attention of runs/x, step 3"
    assert page.locator(".tabs button:visible").all_inner_texts() == ["Lines", "Matrix", "Three steps", "Next token"]
    show(page, "three_steps")  # without vectors there is nothing to move, nor to type
    assert page.locator(".temperature").is_hidden()
    assert page.inner_text(".three-steps .missing").endswith("Choose a shorter sentence.")
    page.keyboard.press("?")
    assert "what it does most in this sentence" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    page.dispatch_event('button:has-text("Type a sentence")', "click")
    assert "tensorboard --logdir runs" in page.inner_text(".toast")


# ---------------------------------------------------------------------------------------------------------------------
# Sharing


def test_the_address_holds_the_view(page: Any, trained_run: Path) -> None:
    address = f"file://{trained_run}/attention.html"
    page.goto(f"{address}#sentence=1&step=12&head=1.2&word=3&view=matrix")
    page.wait_for_selector(".thumb")
    assert page.inner_text(".losses b") == "step 12"
    assert page.inner_text(".head-title h2") == "Layer 1, head 2"
    assert page.locator(".tabs [aria-selected=true]").inner_text() == "Matrix"
    assert page.locator(".controls .grow select").input_value() == "1"
    assert page.locator(".token").nth(3).get_attribute("aria-pressed") == "true"
    page.keyboard.press("]")
    page.wait_for_function("() => location.hash.includes('head=1.3')")
    page.reload()
    page.wait_for_selector(".thumb")
    assert page.inner_text(".head-title h2") == "Layer 1, head 3"


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_can_be_saved(page: Any, trained_run: Path, view: str) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    show(page, view)
    saved = {}
    for index, kind in enumerate(("svg", "png", "csv", "json")):
        page.click(".menu > button")
        with page.expect_download() as download:
            page.locator(".menu-list button").nth(index).click()
        assert download.value.suggested_filename.endswith(f".{kind}")
        saved[kind] = Path(download.value.path()).read_bytes()
    drawing = ElementTree.fromstring(saved["svg"])
    tags = {one.tag.rpartition("}")[2] for one in drawing.iter()}
    assert "text" in tags
    assert tags <= {"svg", "g", "rect", "text", "image", "line", "path"}
    assert saved["png"][:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.reader(io.StringIO(saved["csv"].decode("utf-8-sig"))))
    content = json.loads(saved["json"])
    assert content["step"] == 40
    assert len(rows) - 1 == len(content["rows"]) > 1
    assert rows[0] == list(content["rows"][0])


# ---------------------------------------------------------------------------------------------------------------------
# Keyboard and texts


def test_the_keyboard_reaches_everything(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    page.click('.thumb[aria-label^="Layer 0, head 0"]')
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.inner_text(".head-title h2") == "Layer 1, head 1"
    page.focus(".token[aria-pressed=true]")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.focus('.tabs [aria-selected="true"]')
    for key, chosen in (
        ("ArrowLeft", "lines"),
        ("ArrowRight", "matrix"),
        ("End", "compare"),
        ("ArrowRight", "compare"),
        ("Home", "lines"),
    ):
        page.keyboard.press(key)
        assert page.get_attribute(f'.tabs [data-key="{chosen}"]', "aria-selected") == "true", key
    page.keyboard.press("2")
    page.focus(".plot")
    page.keyboard.press("ArrowUp")
    assert "(key)" in page.inner_text(".readout")
    lists = {"three_steps": ".row-key", "next_token": ".row-key", "lens": ".row-key", "contributions": ".parts .link"}
    for view, name in lists.items():  # one stop of the Tab key for all of a list
        show(page, view)
        page.wait_for_selector(f".panel {name}")
        items, stops = page.locator(f".panel {name}"), page.locator(f".panel {name}:not([tabindex='-1'])")
        assert items.count() > 3
        assert stops.count() == 1, view
        stops.focus()
        page.keyboard.press("End")
        assert items.last.evaluate("one => one === document.activeElement"), view
        assert stops.count() == 1
    show(page, "over_training")
    page.focus(".score-plot")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    told = page.inner_text(".tooltip").split("\n")
    assert told[0] == page.inner_text(".head-title h2")  # of the chosen head
    assert "step " in told[1]
    page.keyboard.press("ArrowDown")
    name = page.inner_text(".tooltip").split("\n")[0]
    page.keyboard.press("Enter")
    assert page.inner_text(".head-title h2") == name != told[0]
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter((e) => e.checkVisibility()"
        " && !(e.innerText || e.ariaLabel || e.title || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_a_printed_page_holds_the_curves_and_no_buttons(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    page.emulate_media(media="print")
    assert page.locator(".chart").bounding_box()["width"] > 600
    assert page.locator(".panel").bounding_box()["height"] >= 320
    buttons = page.evaluate(
        "[...document.querySelectorAll('button, input')].filter((e) => e.checkVisibility()).map((e) => e.className)"
    )
    assert {name.partition(" ")[0] for name in buttons} == {"chip", "thumb", "badge", "token", ""}
    assert page.locator(".tabs button:visible").all_inner_texts() == ["Lines"]


def test_single_keys_can_be_turned_off(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    page.keyboard.press("?")
    page.uncheck("dialog input")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    assert page.locator(".tabs [aria-selected=true]").inner_text() == "Lines"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(page: Any, trained_run: Path, copying_run: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    for run, views in ((trained_run, VIEWS), (copying_run, ("alignment", "lines"))):
        page.goto(f"file://{run}/attention.html")
        page.wait_for_selector(".thumb")
        for view in views:
            show(page, view)
            assert page.evaluate(f"() => {{ {MEASURE}; return lowContrast(); }}") == [], view


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(page: Any, trained_run: Path, copying_run: Path, scheme: str) -> None:
    """WCAG 2.2 AA and axe-core's best practices, in every view and both languages."""
    page.emulate_media(color_scheme=scheme)
    for folder, views in ((trained_run, VIEWS), (copying_run, ("alignment",))):
        page.goto(f"file://{folder}/attention.html")
        page.wait_for_selector(".thumb")
        check = axe_in(page)
        for _ in ("en", "zh"):
            for view in views:
                show(page, view)
                assert check() == [], view
            page.click(".language")
        page.keyboard.press("?")
        assert check() == []


def axe_in(frame: Any) -> Callable[[], Any]:
    """A function that returns what axe-core finds in a frame."""
    package = pytest.importorskip("axe_playwright_python", reason="install the extra minitf[browser]")
    script = (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    frame.evaluate(f"() => {{ {script} }}")
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    names = "({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html])"
    return lambda: frame.evaluate(f"rules => axe.run({{ runOnly: rules }}).then({names})", rules)


@pytest.mark.parametrize("size", [(1366, 650), (683, 325), (342, 163), (390, 800), (1920, 1080)])
def test_nothing_is_cut_off_sideways(page: Any, trained_run: Path, size: tuple[int, int]) -> None:
    """Also at 200 % and 400 % zoom, which a browser shows as a window of half and a quarter of the pixels."""
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    for view in VIEWS:
        show(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], view


def test_model_text_is_never_markup(page: Any, tmp_path: Path) -> None:
    nasty = [
        token
        for token in [*NASTY, "<img src=x onerror=alert(1)>", "<b>bold</b>", "你(1/3)", "שלום"]
        if token != "\ud800"
    ]
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    open_page(page, tmp_path, attention_page([maps_of(nasty)], "<img src=x onerror=alert(1)>"))
    for view in VIEWS[:4]:
        show(page, view)
    assert page.locator("img").count() == 0
    assert "<b>bold</b>" in page.inner_text(".sentence >> nth=0")


def test_hovering_creates_few_elements(page: Any, tmp_path: Path) -> None:
    """Long sentences stay smooth because a movement of the pointer changes attributes and keeps the elements."""
    maps = maps_of(["word"] * 256, 4, 6)
    open_page(page, tmp_path, attention_page([maps], "long"))
    for view in ("matrix", "lines"):
        show(page, view)
        added = page.evaluate(
            """() => {
              let added = 0;
              const tokens = [...document.querySelectorAll(".token")];
              const observer = new MutationObserver(() => {});
              observer.observe(document.body, {childList: true, subtree: true});
              for (let i = 0; i < 40; i++) {
                tokens[i * 6].dispatchEvent(new PointerEvent("pointerenter"));
                for (const record of observer.takeRecords())
                  added += [...record.addedNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE).length;
              }
              return added / 40;
            }"""
        )
        assert added <= ADDED_PER_HOVER, view


# ---------------------------------------------------------------------------------------------------------------------
# The model in the page


def test_in_the_page_a_look_is_forbidden_and_another_word_becomes_the_likeliest(page: Any, pronouns_run: Path) -> None:
    lm = minitf.load(pronouns_run / "checkpoints/latest", device="cpu")
    for parameter in lm.model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as the page holds them
    nouns = [(one, other) for one in ("cat", "dog", "cow", "horse") for other in ("queen", "smith", "uncle")]
    texts = [f"The {one} followed the {other}. It" for one, other in nouns]

    def likeliest(text: str, *changes: Any) -> tuple[str, float]:
        token, share = lm.predict(text, list(changes))[0]
        return token.strip(), share

    def look(text: str) -> Any:
        return edits.block("It", text.split()[1])

    text = next(text for text in texts if likeliest(text)[0] != likeliest(text, look(text))[0])
    noun = text.split()[1]
    page.context.set_offline(True)
    page.goto(f"file://{pronouns_run}/attention.html")
    page.click('button:has-text("Type a sentence")')
    page.fill("textarea", text)
    page.keyboard.press("Enter")
    size = len(lm.tokenizer.encode(text))
    page.wait_for_function(f"() => document.querySelectorAll('.reading .token').length === {size}")
    page.wait_for_function(f"() => document.querySelector('.counter').textContent === '{size} of 64 tokens'")
    page.click(f".reading .token >> nth={size - 1}")
    page.click(f'.thumb[aria-label^="Layer 0, head {lm.attention(text).weights_LHTS[0, :, -1, 1].argmax()}"]')
    show(page, "next_token")
    first = page.locator(".likely").first
    assert first.locator("code").inner_text().strip() == likeliest(text)[0]
    # forbid it in all heads: the prediction changes, and the page says to what
    page.focus(".tabs [data-key=next_token]")
    page.keyboard.press("x")
    assert f"“It” → “{noun}”" in page.inner_text(".look-menu h3")
    page.click('.look-menu [data-key="all"]')
    page.click(".look-menu .primary")
    page.wait_for_selector(".effect-link")
    assert page.inner_text(".effect").startswith(f"Without the look from “It” to “{noun}” (all heads), ")
    token, share = likeliest(text, look(text))
    assert f"“{token}”" in page.inner_text(".effect")
    bars = page.locator(".likely.changed:not(.heading)").all()
    shown = {bar.locator("code").inner_text().strip(): bar.locator("b").last.inner_text() for bar in bars}
    assert abs(float(shown[token].rstrip("%")) / 100 - share) < 0.006
    # the same page opens from its address, and writes on under the edit
    page.wait_for_function("() => location.hash.includes('edits=b')")
    page.reload()
    page.wait_for_selector(".effect-link")
    page.fill('.prompt input[type="number"]', "0")
    page.click('.prompt button:has-text("+1") >> nth=0')
    page.wait_for_function(f"() => document.querySelectorAll('.reading .token').length === {size + 1}")
    assert page.locator(".reading .token.new").inner_text().split("\n")[0].strip() == token
    for view in ("lens", "contributions"):
        show(page, view)
        page.wait_for_selector(f".panel .{view} tbody tr, .panel .{view} li")
    check = axe_in(page)
    assert check() == []


def test_the_page_says_why_a_sentence_cannot_be_read(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.click('button:has-text("Type a sentence")')
    page.fill("textarea", "a" * 40)
    page.keyboard.press("Enter")
    page.wait_for_selector(".problem-box:has-text('40 tokens')")
    page.fill("textarea", "The cat 你好 😀</script>")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.reading .token').length === 28")
    assert "你(1/3)" in page.inner_text(".reading .sentence")


@pytest.mark.parametrize("where", ["page", "tab"])
def test_a_refusal_is_said_in_the_language_of_the_page(page: Any, server: str, trained_run: Path, where: str) -> None:
    if where == "tab":
        frame = frame_of_tab(page, server)
        choose_run(page, frame, "tiny/one")
    else:
        page.goto(f"file://{trained_run}/attention.html")
        page.wait_for_selector(".thumb")
        frame = page
    frame.click(".language")
    frame.click('button:has-text("输入句子")')
    frame.fill("textarea", "a" * 40)
    page.keyboard.press("Enter")
    frame.wait_for_selector(".problem-box p")
    said = frame.inner_text(".problem-box p")
    assert "40 个词元" in said
    assert not re.search("[A-Za-z]", said)
    frame.click(".prompt .icon")
    show(frame, "patch")
    frame.fill(".patch textarea", "The")
    frame.click(".patch .primary")
    frame.wait_for_selector(".patch .missing:visible")
    said = frame.inner_text(".patch .missing:visible")
    assert "个词元" in said
    assert not re.search("[A-Za-z]", said)


def test_a_page_without_its_model_says_so(page: Any, copying_run: Path) -> None:
    page.goto(f"file://{copying_run}/attention.html")
    page.wait_for_selector(".thumb")
    page.dispatch_event('button:has-text("Type a sentence")', "click")
    assert "answers pairs" in page.inner_text(".toast")


# ---------------------------------------------------------------------------------------------------------------------
# The tab


def frame_of_tab(page: Any, server: str, state: str = "") -> Any:
    page.goto(server.split("/data/")[0] + "/#minitf_attention" + state)
    page.wait_for_selector("iframe", timeout=60_000)
    frame = next(frame for frame in page.frames if frame != page.main_frame)
    frame.wait_for_selector(".thumb", timeout=60_000)
    return frame


def choose_run(page: Any, frame: Any, run: str) -> None:
    frame.select_option(".controls .run select", run)
    frame.wait_for_selector(f'main > .columns[data-run="{run}"]:not(.stale)')
    page.wait_for_function(
        "run => decodeURIComponent(decodeURIComponent(location.hash)).includes(`run=${run}&`)", arg=run
    )


def test_the_tab_shows_a_run_and_runs_a_typed_sentence(page: Any, server: str, trained_run: Path) -> None:
    frame = frame_of_tab(page, server)
    choose_run(page, frame, "tiny/one")
    for view in VIEWS:
        show(frame, view)
        assert_one_screen(frame, 8)
        hidden = frame.locator(".panel").evaluate("panel => panel.scrollHeight - panel.clientHeight")
        assert hidden <= 1, view  # the whole view is there
    # also of the least height, as a sentence of two rows leaves it
    show(frame, "three_steps")
    spare = frame.locator(".panel").bounding_box()["height"] - 320
    page.set_viewport_size({"width": LAPTOP["width"], "height": LAPTOP["height"] - int(spare)})
    frame.wait_for_function("() => document.querySelector('.panel').clientHeight <= 321")
    frame.wait_for_function(
        "() => { const panel = document.querySelector('.panel'); return panel.scrollHeight - panel.clientHeight <= 1; }"
    )
    page.set_viewport_size(LAPTOP)
    # the slider: from the last step to an earlier one, and the page follows
    frame.focus(".chart input")
    page.keyboard.press("Home")
    frame.wait_for_function("() => document.querySelector('.losses b').textContent.includes('step 0')")
    page.keyboard.press("End")
    frame.wait_for_function("() => document.querySelector('.losses b').textContent.includes('step 40')")
    # a typed sentence
    frame.click('button:has-text("Type a sentence")')
    frame.wait_for_selector("textarea", state="visible")
    frame.fill("textarea", "The old man sat")
    frame.wait_for_function("() => document.querySelector('.counter').textContent === '15 of 32 tokens'")
    assert "checkpoints kept" in frame.inner_text(".losses")
    assert frame.locator(".prompt button:has-text('Remove generated')").is_disabled()
    with page.expect_response(lambda reply: "old man" in (reply.request.post_data or "") and reply.ok) as answered:
        page.keyboard.press("Enter")
    reply = answered.value.json()
    lm = minitf.load(trained_run / "checkpoints/latest", device="cpu")
    maps = attention_maps(lm.model, lm.tokenizer, "The old man sat")
    query, key = torch.tril_indices(*maps.weights_LHTS.shape[2:])
    weights = torch.frombuffer(bytearray(base64.b64decode(reply["weights"])), dtype=torch.float32)
    torch.testing.assert_close(weights, maps.weights_LHTS[:, :, query, key].flatten(), rtol=0, atol=1e-5)
    frame.wait_for_function("() => document.querySelectorAll('.reading .token').length === 15")
    assert_one_screen(frame, 8)
    frame.click('.prompt button:has-text("+1") >> nth=0')
    frame.wait_for_function("() => document.querySelectorAll('.reading .token').length === 16")
    assert frame.locator(".token.new").count() >= 1
    assert frame.locator(".prompt button:has-text('Remove generated')").is_enabled()
    # a head off: the text stays, and the prediction is shown next to the one before
    written = frame.locator(".reading .token").all_inner_texts()
    show(frame, "next_token")
    frame.click('.thumb[aria-label^="Layer 1, head 2"]')
    frame.click(".switch")
    frame.wait_for_selector(".likely.changed .whole")
    assert frame.locator(".thumb.off").count() == 1
    assert frame.inner_text(".likely.heading").split("\n") == ["unchanged", "with the changes"]
    assert "off: layer 1, head 2" in frame.inner_text(".edit-chips")
    assert len(frame.locator(".reading .token").all_inner_texts()) == len(written)
    # too long a text: the problem stands there, and no map of another text
    frame.fill("textarea", "a" * 40)
    with page.expect_response(lambda reply: reply.status == 422):
        page.keyboard.press("Enter")
    frame.wait_for_selector(".problem-box:has-text('40 tokens')")
    assert frame.locator(".columns").is_hidden()
    frame.fill("textarea", "مرحبا")
    page.keyboard.press("Enter")
    frame.wait_for_selector(".reading .token")
    directions = [frame.locator(name).first.evaluate("one => getComputedStyle(one).direction") for name in READ]
    assert directions == ["rtl", "rtl", "ltr", "ltr"]
    frame.click(".prompt .icon")
    frame.wait_for_selector(".controls .grow select", state="visible")
    frame.wait_for_selector("main > .columns:not(.stale)")
    assert frame.inner_text(".losses b") == "step 40"
    last = frame.locator(".reading .token").last
    assert last.get_attribute("aria-pressed") == "false"  # the most telling word, not the last


def test_a_look_is_forbidden_moved_and_had_back(page: Any, server: str, trained_run: Path) -> None:
    frame = frame_of_tab(page, server)
    choose_run(page, frame, "tiny/one")
    text = "The cat sat on the mat."
    sentences = frame.locator(".controls .grow option").all_inner_texts()
    if frame.input_value(".controls .grow select") != str(sentences.index(text)):
        frame.select_option(".controls .grow select", str(sentences.index(text)))
        frame.wait_for_selector("main > .columns:not(.stale)")
    show(frame, "matrix")
    frame.click('.thumb[aria-label^="Layer 1, head 2"]')
    box = frame.locator(".plot canvas").bounding_box()
    assert box
    page.mouse.click(box["x"] + 4.5 * box["width"] / 23, box["y"] + 9.5 * box["height"] / 23)
    assert "“a” → “c”" in frame.inner_text(".look-menu h3")
    frame.click('.look-menu [data-key="all"]')
    with page.expect_response(lambda reply: reply.url.endswith("/live") and "before" in reply.text()) as answered:
        frame.click(".look-menu .primary")
    edit = {"kind": "block", "query": 9, "keys": [4], "heads": None}
    assert answered.value.request.post_data_json["edits"] == [edit]
    frame.wait_for_selector(".effect-link")
    assert frame.inner_text(".effect").startswith("Without the look from “a” to “c” (all heads), ")
    assert frame.inner_text(".readout") == "“a” (query) gives 0.0% of its attention to “c” (key)."
    # what the sentence says is what the model says
    lm = minitf.load(trained_run / "checkpoints/latest", device="cpu")
    found = re.search(
        r"“(.+)” after “(.+)” (?:falls|rises|goes) from (\S+)% to (\d+\.?\d*)%", frame.inner_text(".effect")
    )
    assert found
    after = [float(p) for _, p in lm.predict(text, [edits.block(9, 4)], top_k=lm.model.vocab_size)]
    assert abs(sum(after) - 1) < 1e-4
    # the keyboard: move the look of the word chosen, in one head
    page.keyboard.press("m")
    frame.wait_for_selector(".look-menu .word")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    frame.wait_for_function("() => document.querySelectorAll('.edit-chips .chip').length === 2")
    page.wait_for_function("() => decodeURIComponent(decodeURIComponent(location.hash)).includes('edits=b9-4,m9-4-1')")
    assert_one_screen(frame, 8)
    # taken back in turn, until the stored sentence is there again
    page.keyboard.press("u")
    frame.wait_for_function("() => document.querySelectorAll('.edit-chips .chip').length === 1")
    page.keyboard.press("Control+z")
    frame.wait_for_selector(".controls .grow select", state="visible")
    assert frame.locator(".edits").is_hidden()
    page.keyboard.press("x")
    page.keyboard.press("Escape")
    assert frame.locator(".look-menu").is_hidden()
    assert frame.locator(".edits").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_the_tab(page: Any, server: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    state = quote("run=tiny/one&text=The cat sat&edits=b5-2,m9-4-1@1.2&off=0.1&step=40", safe="")
    frame = frame_of_tab(page, server, f"&p.minitf_attention.state={state}")
    frame.wait_for_selector(".effect-link")
    check = axe_in(frame)
    for _ in ("en", "zh"):
        for view in PROBES:
            show(frame, view)
            if view == "patch":
                frame.fill(".patch textarea", "The hat sat")
                frame.click(".patch .primary")
            frame.wait_for_selector(f".{view} .scroll:visible")
            assert_one_screen(frame, 8)
            assert check() == [], view
            assert frame.evaluate(f"() => {{ {MEASURE}; return lowContrast(); }}") == [], view
        frame.click(".language")
    page.keyboard.press("x")
    assert check() == []
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    assert check() == []


def test_what_is_stored_with_a_map_is_shown_without_a_model(
    page: Any, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    reader = Reader(make_model(tokenizer.vocab_size), tokenizer)
    text = "The cat sat on the mat."
    maps = attention_maps(reader.model, tokenizer, text).to_viewer()
    maps |= {"lens": lens(reader, text).to_json(), "contributions": contributions(reader, text).to_json()}
    maps |= {"patch": patch(reader, text, "The sat sat on the mat.", "cat", "mat").to_json()}
    open_page(page, tmp_path, viewer_page([maps | {"step": step} for step in (0, 5)], "stored", scored_on="sentence"))
    for view in PROBES:
        show(page, view)
        assert page.locator(f".{view} .scroll").is_visible()
        assert_one_screen(page, 8)
    table = page.locator(".patch-table tbody tr").first
    assert table.locator("td").first.inner_text() == "100%"
    page.click(".patch-table thead .link >> nth=1")
    assert page.locator(".patch-table thead tr").nth(1).locator("th").all_inner_texts()[1:5] == [
        f"head {i}" for i in range(4)
    ]
    show(page, "contributions")
    parts = [float(one.replace("−", "-")) for one in page.locator(".parts b").all_inner_texts()]
    assert sum(parts) == pytest.approx(maps["contributions"]["logit"], abs=0.1)
    page.set_viewport_size({"width": 390, "height": 800})
    for view in PROBES:
        show(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view


def test_the_address_of_the_tab_holds_the_view(page: Any, server: str) -> None:
    state = quote("run=tiny/one&sentence=0&step=12&head=1.3&view=matrix", safe="")
    frame = frame_of_tab(page, server, f"&p.minitf_attention.state={state}")
    frame.wait_for_function("() => document.querySelector('.losses b').textContent === 'step 12'")
    assert frame.inner_text(".head-title h2") == "Layer 1, head 3"
    frame.focus(".thumb[aria-pressed=true]")
    page.keyboard.press("[")
    page.wait_for_function("() => decodeURIComponent(location.hash).includes('head=1.2')")
    assert page.locator("iframe").count() == 1


def test_the_tab_survives_missing_data(page: Any, server: str, logdir: Path) -> None:
    frame = frame_of_tab(page, server)
    for run in ("damaged", "gone", "hundred"):
        choose_run(page, frame, run)
        frame.wait_for_selector(".thumb")
    choose_run(page, frame, "gone")
    frame.dispatch_event('button:has-text("Type a sentence")', "click")
    assert "no checkpoint" in frame.inner_text(".toast")
    assert json.load(urllib.request.urlopen(f"{server}/runs"))["runs"]
    assert os.path.isdir(logdir)


def test_without_runs_the_tab_says_where_it_looked(page: Any, server: str) -> None:
    nothing = {"runs": [], "tags": {}, "logdir": "/some/where", "live": True, "why": None}
    page.route("**/minitf_attention/runs", lambda route: route.fulfill(json=nothing))
    page.goto(server.split("/data/")[0] + "/#minitf_attention")
    page.wait_for_selector("iframe", timeout=60_000)
    frame = next(frame for frame in page.frames if frame != page.main_frame)
    frame.wait_for_selector(".problem-box h2", timeout=60_000)
    assert frame.inner_text(".problem-box h2") == "No attention maps yet"
    assert frame.inner_text(".problem-box p").endswith("/some/where")
    # nothing that does nothing
    assert frame.locator("button:visible").all_inner_texts() == ["?", "中文", "Try again"]
    assert frame.locator("select:visible, input:visible").count() == 0


def test_what_is_loading_or_failed_says_so_where_it_would_be(page: Any, server: str) -> None:
    frame = frame_of_tab(page, server)
    choose_run(page, frame, "tiny/one")
    waiting: list[Any] = []
    page.route("**/minitf_attention/map?*", lambda route: waiting.append(route))
    frame.focus(".chart input")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")  # while the maps of the first step load
    assert frame.inner_text(".losses b") == "step 3"
    frame.wait_for_selector(".columns.stale[aria-busy=true]")
    assert frame.inner_text(".busy") == "Loading…"
    for route in waiting:
        route.continue_()
    frame.wait_for_selector(".columns:not(.stale)")
    assert frame.inner_text(".busy") == ""
    page.unroute("**/minitf_attention/map?*")
    page.route("**/minitf_attention/map?*", lambda route: route.abort())
    for _ in range(4):  # further than what was loaded ahead
        page.keyboard.press("ArrowRight")
    frame.wait_for_selector(".columns.failed")
    assert frame.inner_text(".problem-box p").startswith("TensorBoard does not answer. Is it still running?")
    page.unroute("**/minitf_attention/map?*")
    frame.click(".problem-box button")
    frame.wait_for_selector(".columns:not(.failed):not(.stale)")
    assert frame.locator(".problem-box").is_hidden()


def test_checkpoints_that_are_gone_are_said_where_they_are_needed(page: Any, server: str) -> None:
    frame = frame_of_tab(page, server)
    choose_run(page, frame, "gone")
    for name in ('button:has-text("Type a sentence")', ".switch", ".test"):
        assert "no checkpoint" in frame.get_attribute(name, "title"), name
        assert frame.get_attribute(name, "aria-disabled") == "true"
    frame.focus(".tabs [aria-selected=true]")
    page.keyboard.press("?")
    assert "no checkpoint" in frame.inner_text("dialog")
    page.keyboard.press("Escape")
    # removed while the page is open
    choose_run(page, frame, "tiny/one")
    refused = {"error": "there is no checkpoint of step 40 (any more)", "code": "no_checkpoint", "values": {}}
    page.route("**/minitf_attention/live", lambda route: route.fulfill(status=422, json=refused))
    frame.click('button:has-text("Type a sentence")')
    frame.fill("textarea", "The old man sat")
    page.keyboard.press("Enter")
    frame.wait_for_selector(".problem-box p:has-text('no checkpoint')")
    assert frame.input_value("textarea") == "The old man sat"
    assert frame.locator(".timeline").is_visible()
    assert frame.locator(".columns").is_hidden()
    frame.click(".prompt .icon")
    frame.wait_for_selector(".thumb")
    assert frame.locator(".problem-box").is_hidden()


def test_a_run_is_compared_with_its_first_step_and_with_runs_of_the_same_sentence(page: Any, server: str) -> None:
    frame = frame_of_tab(page, server)
    choose_run(page, frame, "hundred")
    show(frame, "compare")
    frame.wait_for_selector(".compare figure >> nth=2")
    captions = frame.locator(".compare figcaption").all_inner_texts()
    assert [" ".join(one.split()) for one in captions] == ["A step 99", "B step 0", "B − A"]
    options = frame.locator(".compare-with select").first.locator("option").all_inner_texts()
    assert options[0] == "this run at another step"
    assert "run resumed" in options
    assert not any("tiny/one" in option for option in options)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_pair_shows_its_alignment(page: Any, copying_run: Path, tmp_path: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    open_page(page, tmp_path, (copying_run / "attention.html").read_text(encoding="utf-8"))
    assert page.locator(".tabs [aria-selected=true]").inner_text() == "Alignment"
    words = page.locator(".alignment .rows bdi").all_inner_texts()
    assert words == page.locator(".alignment .columns bdi").all_inner_texts()
    right = 0
    for index, word in enumerate(words):
        page.locator(".alignment .rows bdi").nth(index).click()
        read = page.inner_text(".alignment .said")
        assert read.startswith(f"“{word}” looks at “")
        right += read.startswith(f"“{word}” looks at “{word}”")
        assert page.locator(".token.query").inner_text().split("\n")[0] == word  # one selection for all views
    assert right >= len(words) / 2  # a copy: each letter comes from the one at its place
    page.locator(".alignment .plot").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator(".alignment .rows .active").inner_text() == words[-2]
    # At the first step nothing is aligned yet; the view stays.
    page.focus(".timeline input")
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('.timeline').innerText.includes('step 0')")
    assert page.locator(".alignment, .lines").count() == 1


def test_a_text_has_no_alignment_view(page: Any, trained_run: Path, tmp_path: Path) -> None:
    open_page(page, tmp_path, (trained_run / "attention.html").read_text(encoding="utf-8"))
    assert page.locator(".tabs [data-key=alignment]").is_hidden()
    assert page.locator(".tabs [aria-selected=true]").inner_text() == "Lines"
