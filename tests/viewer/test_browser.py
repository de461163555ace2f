"""The viewer in a real browser: the page from a file, and the tab in TensorBoard. Skipped without a browser.

Playwright is found if it is installed (`pip install playwright`), and with it its own Chromium or the system's.
"""

import base64
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NASTY, maps_of

import minitf
from minitf.interpretability.attention_maps import attention_maps
from minitf.interpretability.page import attention_page

pytestmark = pytest.mark.browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# Elements a hover may add: the line that describes what the word looks at.
ADDED_PER_HOVER = 12
VIEWS = ("lines", "matrix", "three_steps", "next_token", "over_training", "compare")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="install the extra minitf[browser]")
    with playwright.sync_playwright() as started:
        system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            launched = started.chromium.launch(args=FLAGS, executable_path=system)
        except playwright.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty page on which any error fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, locale="en-US")
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
    return bool(reply.status >= 400 and "minitf_attention" in reply.url)


def _is_own(url: str) -> bool:
    return url.startswith(("file://", "data:", "blob:", "http://localhost:"))


def open_page(page: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "attention.html").write_text(content, encoding="utf-8")
    page.goto(f"file://{tmp_path}/attention.html")
    page.wait_for_selector(".thumb")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_opens_without_network(page: Any, trained_run: Path, tmp_path: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.context.set_offline(True)
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    assert page.locator(".attention-viewer").get_attribute("data-theme") == scheme
    for language in ("en", "zh"):
        page.click(f'.choice [data-key="{language}"]')
        for view in VIEWS:
            page.click(f'.tabs [data-key="{view}"]')
            page.wait_for_selector(f'.tabs [data-key="{view}"][aria-selected="true"]')
            assert len(page.inner_text(".panel")) > 20
    page.click('.choice [data-key="en"]')
    assert "tensorboard --logdir runs" in page.inner_text("footer")


def test_the_readout_shows_the_stored_weight(page: Any, tmp_path: Path) -> None:
    maps = maps_of(["the", " cat", " sat", " on", " it"])
    open_page(page, tmp_path, attention_page([maps], "title"))
    page.click('.tabs [data-key="matrix"]')
    page.click('.thumb[title^="Layer 1, head 2"]')
    box = page.locator(".plot canvas").bounding_box()
    for query in range(5):
        for key in range(query + 1):
            page.mouse.move(box["x"] + (key + 0.5) * box["width"] / 5, box["y"] + (query + 0.5) * box["height"] / 5)
            said = page.inner_text(".readout")
            share = float(said.split(" gives ")[1].split("%")[0]) / 100
            assert abs(share - float(maps.weights_LHTS[1, 2, query, key])) <= 1 / 255
            assert said.startswith(f"“{maps.tokens[query].strip()}” (query)")
            assert f"“{maps.tokens[key].strip()}” (key)" in said


def test_the_keyboard_reaches_everything(page: Any, trained_run: Path) -> None:
    page.goto(f"file://{trained_run}/attention.html")
    page.wait_for_selector(".thumb")
    page.focus('.thumb[aria-pressed="true"]')
    page.click('.thumb[title^="Layer 0, head 0"]')
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "Layer 1, head 1" in page.inner_text(".head-title h2")
    page.focus(".token[aria-pressed=true]")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.focus('input[type="range"]')
    before = page.get_attribute('.chart input[type="range"]', "aria-valuetext")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "was => document.querySelector('.chart input').getAttribute('aria-valuetext') !== was", arg=before
    )
    page.focus('.tabs [aria-selected="true"]')
    page.keyboard.press("ArrowRight")
    assert page.get_attribute('.tabs [data-key="matrix"]', "aria-selected") == "true"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter((e) => e.checkVisibility()"
        " && !(e.innerText || e.ariaLabel || e.title || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_model_text_is_never_markup(page: Any, tmp_path: Path) -> None:
    nasty = [
        token
        for token in [*NASTY, "<img src=x onerror=alert(1)>", "<b>bold</b>", "你(1/3)", "שלום"]
        if token != "\ud800"
    ]
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    open_page(page, tmp_path, attention_page([maps_of(nasty)], "<img src=x onerror=alert(1)>"))
    for view in VIEWS:
        page.click(f'.tabs [data-key="{view}"]')
    assert page.locator("img").count() == 0
    assert "<b>bold</b>" in page.inner_text(".sentence >> nth=0")


def test_hovering_creates_few_elements(page: Any, tmp_path: Path) -> None:
    """Long sentences stay smooth because a movement of the pointer changes attributes and keeps the elements."""
    maps = maps_of(["word"] * 256, 4, 6)
    open_page(page, tmp_path, attention_page([maps], "long"))
    for view in ("matrix", "lines"):
        page.click(f'.tabs [data-key="{view}"]')
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


def frame_of_tab(page: Any, server: str) -> Any:
    page.goto(server.split("/data/")[0] + "/#minitf_attention")
    page.wait_for_selector("iframe", timeout=60_000)
    frame = next(frame for frame in page.frames if frame != page.main_frame)
    frame.wait_for_selector(".thumb", timeout=60_000)
    return frame


def choose_run(frame: Any, run: str) -> None:
    frame.select_option(".controls select >> nth=0", run)
    frame.wait_for_function("run => document.querySelector('.controls select').value === run", arg=run)
    time.sleep(0.5)


def test_the_tab_shows_a_run_and_runs_a_typed_sentence(
    page: Any,
    server: str,
    trained_run: Path,
) -> None:
    frame = frame_of_tab(page, server)
    choose_run(frame, "tiny/one")
    for view in VIEWS:
        frame.click(f'.tabs [data-key="{view}"]')
        frame.wait_for_selector(f'.tabs [data-key="{view}"][aria-selected="true"]')
    # the slider: from the last step to an earlier one, and the page follows
    frame.focus(".chart input")
    page.keyboard.press("Home")
    frame.wait_for_function("() => document.querySelector('.losses b').textContent.includes('step 0')")
    page.keyboard.press("End")
    frame.wait_for_function("() => document.querySelector('.losses b').textContent.includes('step 40')")
    # a typed sentence
    frame.select_option(".controls .grow select", label="✎ type a sentence…")
    frame.wait_for_selector("textarea", state="visible")
    frame.fill("textarea", "The old man sat")
    with page.expect_response(lambda reply: reply.url.endswith("/live")) as answered:
        frame.click(".prompt .primary")
    reply = answered.value.json()
    lm = minitf.load(trained_run / "checkpoints/latest", device="cpu")
    maps = attention_maps(lm.model, lm.tokenizer, "The old man sat")
    query, key = torch.tril_indices(*maps.weights_LHTS.shape[2:])
    weights = torch.frombuffer(bytearray(base64.b64decode(reply["weights"])), dtype=torch.float32)
    torch.testing.assert_close(weights, maps.weights_LHTS[:, :, query, key].flatten(), rtol=0, atol=1e-5)
    frame.wait_for_function("() => document.querySelectorAll('.reading .token').length === 15")
    frame.click(".prompt-row button >> nth=1")
    frame.wait_for_function("() => document.querySelectorAll('.reading .token').length === 16")
    assert frame.locator(".token.new").count() >= 1
    # a head off: the prediction changes and is shown next to the one before
    frame.click('.tabs [data-key="next_token"]')
    frame.click('.thumb[title^="Layer 1, head 2"]')
    frame.click(".switch")
    frame.wait_for_selector(".likely.changed .whole")
    assert frame.locator(".thumb.off").count() == 1
    assert "Layer 1, head 2" in frame.inner_text(".off-heads")


def test_the_tab_survives_missing_data(page: Any, server: str, logdir: Path) -> None:
    frame = frame_of_tab(page, server)
    for run in ("damaged", "gone", "hundred"):
        choose_run(frame, run)
        frame.wait_for_selector(".thumb")
    choose_run(frame, "gone")
    assert "type a sentence" not in frame.inner_text(".controls .grow select")
    assert json.load(urllib.request.urlopen(f"{server}/runs"))["runs"]
    assert os.path.isdir(logdir)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_pair_shows_its_alignment(page: Any, copying_run: Path, tmp_path: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    open_page(page, tmp_path, (copying_run / "attention.html").read_text(encoding="utf-8"))
    assert page.locator(".tabs [aria-selected=true]").inner_text() == "Alignment"
    source, target = (page.locator(".pair-side").nth(side) for side in (0, 1))
    words = target.locator(".word").all_inner_texts()
    assert words == source.locator(".word").all_inner_texts()
    right = 0
    for index, word in enumerate(words):
        target.locator(".word").nth(index).hover()
        read = page.locator(".alignment .readout").inner_text()
        assert read.startswith(f"“{word}” was made from “")
        right += read.startswith(f"“{word}” was made from “{word}”")
    assert right >= len(words) / 2  # a copy: each letter comes from the one at its place
    page.locator(".alignment .plot").focus()
    page.keyboard.press("ArrowUp")
    assert target.locator(".word.active").inner_text() == words[-2]
    # At the first step nothing is aligned yet; the view stays.
    page.locator(".timeline input").evaluate("input => { input.value = 0; input.dispatchEvent(new Event('input')) }")
    page.wait_for_function("document.querySelector('.timeline').innerText.includes('step 0')")
    assert page.locator(".alignment, .lines").count() == 1


def test_a_text_has_no_alignment_view(page: Any, trained_run: Path, tmp_path: Path) -> None:
    open_page(page, tmp_path, (trained_run / "attention.html").read_text(encoding="utf-8"))
    assert page.locator(".tabs [data-key=alignment]").is_hidden()
    assert page.locator(".tabs [aria-selected=true]").inner_text() == "Lines"
