"""The viewer in Chromium: how soon it shows what was asked, where its parts are, what TensorBoard opens with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from minitf.benchmark.browser import chromium, milliseconds, tab, tensorboard
from minitf.benchmark.comparison import Row
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request
from minitf.benchmark.training import TOY, train
from minitf.errors import Unavailable

# The models are hardly trained: the viewer takes as long with any weights.
SHAPES = {
    "nano": ["model=nano"],
    "24 heads": ["model=mini"],
    "144 heads": ["model.num_layers=12", "model.num_heads=12", "model.hidden_size=192", "model.context_length=256"],
}
QUICK = {
    "nano": TOY | {"context_length": 128},
    "24 heads": {**TOY, "num_layers": 4, "num_heads": 6, "hidden_size": 48, "context_length": 64},
    "144 heads": {"num_layers": 12, "num_heads": 12, "hidden_size": 48, "context_length": 256},
}
SHORT = (
    "trainer.batch_size=1", "trainer.compile=false", "trainer.eval_tokens=512", "trainer.sample_tokens=0",
    "trainer.log_every=1", "trainer.device=cpu",
)  # fmt: skip
PAGES = {"24 heads": 30, "144 heads": 130}  # tokens of the sentence on the page from a file
EVENTS = ("a key that does nothing", "a click on a head", "a hover on a cell", "a step of the slider")
TYPED, PATCHED = 64, 32  # tokens
WINDOWS = ((1366, 650), (1440, 900), (390, 800))
PARTS = {"run and sentence": ".controls", "time line": ".timeline", "heads": ".overview", "sentence": ".sentence"}
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light. And God saw the light, that it was good: and God divided the light from the "
    "darkness. And God called the light Day, and the darkness he called Night. And the evening and the morning were "
    "the first day. And God said, Let there be a firmament in the midst of the waters, and let it divide the waters "
    "from the waters. And God made the firmament, and divided the waters which were under the firmament."
)
FIRST_WORDS = ("At", "By", "On", "To", "So", "As", "Of", "It", "He", "We", "No", "If", "My", "Up", "Or", "Be")
# JavaScript: what an event changes, and whether all of it is there.
MAP = "[...document.querySelectorAll('.panel canvas')].map((one) => one.toDataURL()).join()"
POINTED = "document.querySelector('.tooltip').textContent"
EFFECT = "document.querySelector('.effect-link')?.checkVisibility()"
TABLE = "document.querySelector('.patch-table').innerHTML"
FILLED = "!document.querySelector('.patch progress').checkVisibility()"
FIRST_COLUMN = "document.querySelector('.patch-table tbody td:not(:empty)')"


def viewer(request: Request, report: Report) -> None:
    """The benchmark of this name. Runs that are in `--work` already are used again."""
    try:
        with chromium() as browser:
            _Viewer(request, report, browser).measure()
    except Unavailable as error:
        report.skip("the viewer", str(error))


@dataclass
class _Viewer:
    request: Request
    report: Report
    browser: Any

    def __post_init__(self) -> None:
        self.num_events = 2 if self.request.quick else 10  # of each kind in a round

    def measure(self) -> None:
        nano = self.make_run("nano", "trainer.snapshots=auto")
        texts = _sentences(nano, list(PAGES.values()))["texts"]
        looks = "trainer.attention_every=2", "trainer.snapshots=none"
        runs = {
            name: self.make_run(name, *looks, f'attention.probes=["{text}"]')
            for name, text in zip(PAGES, texts, strict=True)
        }
        for name, run in runs.items():
            self.measure_page(f"page, {name}, {PAGES[name]} tokens", run)
        self.measure_typed(nano)
        self.measure_patching(runs["24 heads"])
        for name, run in (("nano", nano), ("144 heads", runs["144 heads"])):
            self.measure_cards(name, run)

    def make_run(self, name: str, *options: str) -> Path:
        folder = f"viewer {name}/run"
        run = self.request.work / "runs" / folder
        if not (run / "attention.html").exists():
            self.report.progress(f"training {name}")
            overrides = [*SHAPES[name], *SHORT, f"trainer.max_steps={self.num_steps(name)}", *options]
            if self.request.quick:
                overrides += ["tokenizer=byte", *(f"model.{key}={value}" for key, value in QUICK[name].items())]
            train(self.request, overrides, folder)
        return run

    def num_steps(self, name: str) -> int:
        """Enough for the slider to have as many stops as it is measured at."""
        return 4 if self.request.quick else {"nano": 32}.get(name, 10)

    @contextmanager
    def page(self) -> Iterator[Any]:
        """A new page in a laptop's window."""
        context = self.browser.new_context(viewport=_size(WINDOWS[0]), locale="en-US")
        yield context.new_page()
        context.close()

    @contextmanager
    def tensorboard(self, name: str, run: Path) -> Iterator[str]:
        with tensorboard(run.parent, run.name, self.num_steps(name)) as address:
            yield address

    def rounds(self, what: str) -> Iterator[int]:
        for round_ in range(self.request.repeats):
            self.report.progress(f"{what}: round {round_ + 1} of {self.request.repeats}")
            yield round_

    def add(self, what: str, samples: list[float], unit: str = "ms", note: str = "", **raw: Any) -> None:
        self.report.add(Row(what, unit, samples, more_is_better=False, note=note, raw=raw))

    # -- the page from a file -----------------------------------------------------------------------------------------

    def measure_page(self, name: str, run: Path) -> None:
        """A click on a head, a hover on a cell, a step of the slider; the size; where the parts are."""
        found: dict[str, list[float]] = {name: [] for name in EVENTS}
        nothing, clicks, hovers, steps = found.values()
        for _ in self.rounds(name):
            with self.page() as page:
                _open(page, run, {"view": "matrix", "sentence": 0})
                box = page.locator(".plot canvas").bounding_box()
                for i in range(self.num_events):
                    point = box["x"] + box["width"] * (0.1 + i / 30), box["y"] + box["height"] * 0.9
                    hovers.append(milliseconds(page, partial(page.mouse.move, *point), "pointermove", POINTED))
                others = page.locator('.thumb[aria-pressed="false"]')
                for i in range(self.num_events):
                    clicks.append(milliseconds(page, others.nth(i).click, "click", MAP))
                    nothing.append(milliseconds(page, lambda: page.keyboard.press("F9"), "keydown", "{}"))
                page.focus(".timeline input")
                steps += self.walk(page, page, "ArrowLeft", self.num_events // 2)
                steps += self.walk(page, page, "ArrowRight", self.num_events // 2)
        for what, samples in found.items():
            self.add(f"{name}: {what}", samples)
        self.add(name, [(run / "attention.html").stat().st_size / 1e6], "MB")
        with self.page() as page:
            _open(page, run, {})
            for window in WINDOWS:
                self.measure_positions(name, page, page, window)

    def walk(self, page: Any, frame: Any, key: str, count: int) -> list[float]:
        """The milliseconds of steps of the slider, which has the focus."""
        return [milliseconds(frame, lambda: page.keyboard.press(key), "keydown", MAP) for _ in range(count)]

    def measure_positions(self, name: str, page: Any, frame: Any, window: tuple[int, int]) -> None:
        page.set_viewport_size(_size(window))
        page.wait_for_timeout(300)  # the views follow the size of the window
        boxes = {what: frame.locator(part).bounding_box() for what, part in (PARTS | {"view": ".panel"}).items()}
        tops = {what: round(box["y"]) for what, box in boxes.items()}
        note = "tops: " + ", ".join(f"{what} {top}" for what, top in tops.items())
        self.add(f"{name}, {window[0]} x {window[1]}: the view", [boxes["view"]["height"]], "px", note, tops=tops)

    # -- a typed sentence ---------------------------------------------------------------------------------------------

    def measure_typed(self, run: Path) -> None:
        """A look forbidden, in the tab and on the page; in the tab also steps of the slider."""
        text = _sentences(run, [TYPED])["texts"][0]
        state = {"run": run.name, "text": text, "word": TYPED - 1, "view": "matrix"}
        live, offline, first, again = list[float](), list[float](), list[float](), list[float]()
        with self.tensorboard("nano", run) as address:
            for round_ in self.rounds("a typed sentence"):
                with self.page() as page:
                    frame = tab(page, address, urlencode(state))
                    live += self.forbid(page, frame)
                    if not round_:
                        self.measure_positions("tab, a sentence typed", page, frame, WINDOWS[0])
                    frame.focus(".timeline input")
                    first += self.walk(page, frame, "ArrowLeft", self.num_events)
                    again += self.walk(page, frame, "ArrowRight", self.num_events)
                with self.page() as page:
                    _open(page, run, state)
                    offline += self.forbid(page, page)
            with self.page() as page:
                self.measure_positions("tab", page, tab(page, address, ""), WINDOWS[0])
        self.add(f"tab: a look forbidden, {TYPED} tokens", live)
        self.add(f"page: a look forbidden, {TYPED} tokens", offline)
        self.add(f"tab: a step of the slider, {TYPED} tokens, first visit", first)
        self.add(f"tab: a step of the slider, {TYPED} tokens, revisited", again)

    def forbid(self, page: Any, frame: Any) -> list[float]:
        """Forbid a look in all heads and undo it, word by word from the last; the first time warms up."""
        found = []
        frame.wait_for_selector(f".token >> nth={TYPED - 1}")
        frame.click(".thumb[aria-pressed=true]")
        for _ in range(self.num_events + 1):
            page.keyboard.press("j")
            page.keyboard.press("x")
            frame.wait_for_selector(".look-menu .primary:focus")
            found.append(milliseconds(frame, lambda: page.keyboard.press("Enter"), "keydown", MAP, EFFECT))
            milliseconds(frame, lambda: page.keyboard.press("u"), "keydown", MAP)
        return found[1:]

    def measure_patching(self, run: Path) -> None:
        """The table of two sentences that differ in the first word: its first column, and all of it."""
        found = _sentences(run, [PATCHED])
        state = {"run": run.name, "text": found["texts"][0], "word": PATCHED - 1, "view": "patch"}
        whole, first = list[float](), list[float]()
        with self.tensorboard("24 heads", run) as address, self.page() as page:
            frame = tab(page, address, urlencode(state))
            frame.wait_for_selector(f".token >> nth={PATCHED - 1}")
            for index, changed in enumerate(found["changed"][: 2 * self.request.repeats + 1]):
                frame.fill(".patch textarea", changed)
                ready, times = (FILLED, whole) if index % 2 else (FIRST_COLUMN, first)
                times.append(milliseconds(frame, lambda: frame.click(".patch .primary"), "click", TABLE, ready))
                frame.wait_for_function(FILLED)
            values = frame.locator(".patch-table tbody td:not(:empty)").count()
        self.add(f"tab: two sentences compared, {PATCHED} positions", whole, note=f"{values} values")
        self.add("... its first layer", first[1:])

    # -- TensorBoard --------------------------------------------------------------------------------------------------

    def measure_cards(self, name: str, run: Path) -> None:
        """The page that TensorBoard opens with: the cards of all its groups, and those that it shows at first."""
        with self.tensorboard(name, run) as address, self.page() as page:
            page.goto(address)
            page.wait_for_selector("card-view", timeout=60_000)
            page.wait_for_timeout(2000)  # the groups come one after the other
            counts = [int(text.split()[0]) for text in page.locator(".card-group .group-card-count").all_inner_texts()]
            cards = sum(counts) + page.locator(".card-group").count() - len(counts)  # a group of one has no number
            shown = page.locator("card-view").count()
        self.add(f"TensorBoard's first page, {name}", [float(cards)], "cards", f"{shown} of them open")


def _size(window: tuple[int, int]) -> dict[str, int]:
    return {"width": window[0], "height": window[1]}


def _open(page: Any, run: Path, state: dict[str, Any]) -> None:
    page.goto(f"{(run / 'attention.html').as_uri()}#{urlencode(state)}")
    page.wait_for_selector(".thumb")


def _sentences(run: Path, lengths: list[int]) -> dict[str, Any]:
    """`texts` of these numbers of tokens; `changed` are variants of the last one, with another first word."""
    arguments = {"checkpoint": str(run / "checkpoints/latest"), "text": TEXT, "lengths": lengths}
    return in_child("library:sentences", {**arguments, "first_words": FIRST_WORDS})
