"""Draw .github/it-finds-the-cat.svg: "It" finds the cat while the slider moves, and one forbidden look breaks it.

    python -m minitf.train experiment=pronouns run_dir=runs/picture trainer.save_every=4 trainer.keep_checkpoints=99
    python tests/documentation/moving_picture.py runs/picture

Every weight and every probability is the model's own, of the stored checkpoints and of `lm.predict(text, edits)`.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import minitf
from minitf.edits import block

PICTURE = Path(__file__).parents[2] / ".github/it-finds-the-cat.svg"
TEXT = "The cat helped the queen. It"
WORDS = ("The", "cat", "helped", "the", "queen", ".", "It")
CENTRES = (78, 152, 254, 346, 436, 508, 570)  # of the words, in pixels
QUERY, MEANT, OTHER = 6, 1, 4
NUM_GUESSES = 3
SECONDS_A_STEP, SECONDS_AT_THE_END, SECONDS_OF_A_TEST = 0.3, 2.5, 4.0
WIDTH, HEIGHT, BASE, TRACK = 860, 292, 180, 256  # BASE: of the words; TRACK: of the slider
STYLE = """
text { font: 22px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2933; }
.small { font-size: 15px; fill: #52606d; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.strong { font-weight: 650; } .look { stroke: #2f6fde; fill: none; stroke-linecap: round; }
.bar { fill: #9db8e8; } .right { fill: #2f6fde; } .no { stroke: #d64545; fill: none; stroke-width: 3; }
.alarm { fill: #d64545; } .track { stroke: #cbd2d9; stroke-width: 4; stroke-linecap: round; }
.page { fill: #ffffff; stroke: #e4e7eb; }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb; } .small { fill: #9aa5b1; } .page { fill: #161b22; stroke: #30363d; }
  .look { stroke: #6ea0f7; } .right { fill: #6ea0f7; } .bar { fill: #3d5a8f; } .track { stroke: #3e4c59; }
  .no { stroke: #ff7b72; } .alarm { fill: #ff7b72; }
}
"""


class Frame(NamedTuple):
    """What one moment of the picture shows."""

    step: int
    weights: list[float]  # of "It" on each word
    guesses: list[tuple[str, float]]  # the likeliest next words
    seconds: float
    title: str
    forbidden: int | None = None  # the word that "It" may not look at


def by_word(lm: minitf.LanguageModel, weights_S: list[float]) -> list[float]:
    """The weights on tokens, added up for each word."""
    ids = lm.tokenizer.encode(TEXT)
    totals = [0.0] * len(WORDS)
    for token, weight in enumerate(weights_S):
        read = lm.tokenizer.decode(ids[: token + 1])
        totals[len(re.findall(r"\w+|\.", read)) - 1] += weight
    return totals


def frames_of(run: Path) -> list[Frame]:
    """A frame for each checkpoint of the run, then two tests of the last one."""
    models = [minitf.load(path) for path in sorted(run.glob("checkpoints/step_*"))]
    last = models[-1]
    heads = [by_word(last, row) for row in last.attention(TEXT).weights_LHTS[0, :, -1].tolist()]
    head = max(range(len(heads)), key=lambda number: heads[number][MEANT])
    frames = []
    for lm in models:
        weights = by_word(lm, lm.attention(TEXT).weights_LHTS[0, head, -1].tolist())
        title = "While it trains: what does “It” look at?"
        frames.append(Frame(lm.step or 0, weights, guesses(lm.predict(TEXT)), SECONDS_A_STEP, title))
    trained = frames[-1] = frames[-1]._replace(seconds=SECONDS_AT_THE_END)
    for word, changes in ((MEANT, "the model guesses"), (OTHER, "nothing changes")):
        allowed = [0.0 if i == word else weight for i, weight in enumerate(trained.weights)]
        changed = guesses(last.predict(TEXT, [block("It", WORDS[word])]))
        assert (changed[0][0] == trained.guesses[0][0]) == (word == OTHER), changed
        shares = [weight / sum(allowed) for weight in allowed]  # softmax over the other scores
        title = f"{'Test' if word == MEANT else 'Control'}: without the look at “{WORDS[word]}” {changes}"
        frames.append(Frame(trained.step, shares, changed, SECONDS_OF_A_TEST, title, word))
    return frames


def guesses(found: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(word.strip().replace("<|endoftext|>", "(end)"), share) for word, share in found[:NUM_GUESSES]]


def shown(frame: Frame, begin: float, total: float, drawing: str) -> str:
    """A group that is visible only during its frame, again and again."""
    start, end = begin / total, (begin + frame.seconds) / total
    times, values = (f"0;{end:.5f}", "visible;hidden") if start == 0 else (
        f"0;{start:.5f};{end:.5f}", "hidden;visible;hidden")  # fmt: skip
    if end > 0.99999:
        times, values = f"0;{start:.5f}", "hidden;visible"
    animate = f'<animate attributeName="visibility" values="{values}" keyTimes="{times}" calcMode="discrete"'
    return f'<g visibility="hidden">{animate} dur="{total:.2f}s" repeatCount="indefinite"/>{drawing}</g>\n'


def looks(frame: Frame) -> str:
    """Arcs from "It" to every word, as thick as its weight, with the weight above the word."""
    drawn = []
    for word, (centre, weight) in enumerate(zip(CENTRES, frame.weights, strict=True)):
        if weight >= 0.01 and word != QUERY:
            middle, height = (centre + CENTRES[QUERY]) / 2, BASE - 28 - (CENTRES[QUERY] - centre) / 3.2
            path = f"M{CENTRES[QUERY]} {BASE - 24} Q{middle:.0f} {height:.0f} {centre} {BASE - 24}"
            size = f'stroke-width="{1 + 11 * weight:.1f}" opacity="{0.25 + 0.7 * weight:.2f}"'
            drawn.append(f'<path class="look" d="{path}" {size}/>')
        if word != frame.forbidden:
            drawn.append(f'<text class="small middle" x="{centre}" y="{BASE + 26}">{weight:.0%}</text>')
    if frame.forbidden is not None:
        x, y = CENTRES[frame.forbidden], BASE - 8
        drawn.append(
            f'<circle class="no" cx="{x}" cy="{y}" r="24"/><path class="no" d="M{x - 17} {y + 17} L{x + 17} {y - 17}"/>'
        )
    return "".join(drawn)


def predictions(frame: Frame, right: str) -> str:
    """The likeliest next words, as bars."""
    drawn = ['<text class="small" x="640" y="70">the model continues:</text>']
    for row, (word, share) in enumerate(frame.guesses):
        y = 102 + 40 * row
        kind = "right" if word == right else "bar"
        drawn.append(f'<rect class="{kind}" x="640" y="{y + 8}" width="{max(1, 160 * share):.0f}" height="7" rx="3"/>')
        drawn.append(f'<text class="{"strong" if row == 0 else ""}" x="640" y="{y}">{escape(word)}</text>')
        drawn.append(f'<text class="small end" x="830" y="{y}">{share:.0%}</text>')
    return "".join(drawn)


def draw(frames: list[Frame]) -> str:
    """The whole picture; it moves by itself and needs no script."""
    right = max((one for one in frames if one.forbidden is None), key=lambda one: one.step).guesses[0][0]
    total = sum(frame.seconds for frame in frames)
    last_step, begin, moving = frames[-1].step, 0.0, []
    for frame in frames:
        x = 60 + 520 * frame.step / last_step
        slider = (
            f'<circle class="right" cx="{x:.0f}" cy="{TRACK}" r="9"/>'
            f'<text class="small" x="610" y="{TRACK + 5}">step {frame.step}</text>'
        )
        kind = "alarm" if frame.forbidden == MEANT else ""
        title = f'<text class="strong {kind}" x="40" y="40">{frame.title}</text>'
        moving.append(shown(frame, begin, total, title + looks(frame) + predictions(frame, right) + slider))
        begin += frame.seconds
    words = "".join(
        f'<text class="middle {"strong" if word == QUERY else ""}" x="{x}" y="{BASE}">{WORDS[word]}</text>'
        for word, x in enumerate(CENTRES)
    )
    label = "While the slider moves through training, “It” finds the cat; without that look the model guesses"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="page" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>\n'
        f'{words}\n<path class="track" d="M60 {TRACK} H580"/>\n{"".join(moving)}</svg>\n'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(frames_of(Path(sys.argv[1]))), encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")
