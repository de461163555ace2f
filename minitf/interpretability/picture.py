"""Labelled pictures for TensorBoard: the weights of all heads, the importance of heads, the alignment of words.

They are drawn inside the training loop, so they are made of NumPy blocks with one byte per pixel: an index into a
palette whose first half holds the colours of weights and whose second half fades from the background to text colours.
"""

from __future__ import annotations

import io
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.interpretability.alignment import Alignment
from minitf.interpretability.attention_maps import AttentionMaps
from minitf.interpretability.heads import RESTING_PATTERNS, Head, HeadScores, describe_head, head_pattern

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MAX_SIDE = 2400  # pixels; larger pictures slow TensorBoard down and fit no screen
MAX_WIDTH, MIN_WIDTH = 960, 720  # pixels of the picture of heads; TensorBoard shows it about 480 wide
MAX_TOKENS_OF_FOUR = 16  # in a text of which four heads are shown; of a longer text one
MAX_CELL, MIN_LABELLED_CELL = 28, 12  # pixels per token; below the minimum, token labels are unreadable
TYPE = 20  # pixels
MIN_PANEL = 330  # pixels; fits the widest label of a head
GAP, MARGIN = 14, 16
MAX_LABEL = 110  # pixels of a token label
MAX_ALIGNED_WORDS = 90  # per side

BACKGROUND, INK, ACCENT = (252, 252, 253), (28, 26, 36), (160, 32, 111)  # as TensorBoard's own page: light
REPLACEMENTS = str.maketrans({"⏎": "\\n", "⇥": "\\t", "⟨": "<", "⟩": ">"})  # Pillow's font lacks these
# Lightness decreases evenly from weight 0 to weight 1 (after Matplotlib's "inferno"); the viewer has the same colours.
# fmt: off
RAMP = [(243, 241, 246), (252, 222, 170), (250, 170, 92), (232, 98, 78),
        (186, 54, 110), (124, 32, 124), (70, 24, 104), (28, 14, 50)]
# fmt: on
BACKGROUND_INDEX, FIRST_WEIGHT, NUM_WEIGHTS = 0, 1, 127
FIRST_INK, FIRST_ACCENT, NUM_INKS = 128, 192, 64


def attention_picture(maps: AttentionMaps, scores: HeadScores | None = None) -> bytes:
    """A PNG of the most telling heads, labelled by `scores` (default: those of `maps`).

    TensorBoard shrinks a picture to about half its size, so that only large type stays readable: four heads of a text
    of up to 16 tokens, one head of a longer text. The Attention tab shows all.

    The colour of a cell shows the square root of the weight, so that a head that spreads its attention is not just
    pale; the colour bar is labelled with weights. Texts too long to draw at one pixel per token show the largest weight
    of a block.
    """
    scores = maps.scores if scores is None else scores
    num_columns = 2 if len(maps.tokens) <= MAX_TOKENS_OF_FOUR and maps.weights_LHTS[:, :, 0, 0].numel() > 1 else 1
    heads = telling_heads(maps.weights_LHTS, scores)[: num_columns**2]
    blocks, cell = _blocks(maps.weights_LHTS, heads, num_columns)
    side = blocks[0].shape[0] * cell
    labelled = cell >= MIN_LABELLED_CELL
    tokens = [_token_patch(token, min(cell - 2, TYPE)) for token in maps.tokens] if labelled else []

    left, top = MARGIN + _widest(tokens) + 8, MARGIN + 96
    pitch_x, pitch_y = max(side, MIN_PANEL) + GAP, 30 + side + GAP
    num_rows = -(-len(heads) // num_columns)
    bottom = top + num_rows * pitch_y
    width = max(left + num_columns * pitch_x - GAP + MARGIN, MIN_WIDTH)
    canvas = np.zeros((bottom + _widest(tokens) + MARGIN, width), np.uint8)
    _draw_title(canvas, maps.step, " ".join(maps.text.split()), _note(maps, len(heads)), TYPE)
    _draw_colour_bar(canvas, MARGIN + 60)
    for number, (layer, head) in enumerate(heads):
        x, y = left + number % num_columns * pitch_x, top + 30 + number // num_columns * pitch_y
        label = f"layer {layer}, head {head}"
        if scores and (pattern := describe_head(scores, layer, head)):
            label += f": {pattern}"
        _paste(canvas, _text_patch(label, TYPE, pitch_x, FIRST_ACCENT), x, y - 26)
        canvas[y : y + side, x : x + side] = blocks[number].repeat(cell, 0).repeat(cell, 1)
        if number % num_columns == 0:
            _draw_row_labels(canvas, tokens, left - 6, y, cell)
        if number // num_columns == num_rows - 1:
            for column, upright in enumerate(map(np.rot90, tokens)):
                _paste(canvas, upright, x + column * cell + (cell - upright.shape[1]) // 2, y + side + 5)
    return _png(canvas)


def telling_heads(weights_LHTS: Tensor, scores: HeadScores | None) -> list[Head]:
    """All heads, the most telling first: the best of each pattern, resting patterns last; then the others.

    Heads without a name, and all heads without scores, are in the order of the mean of their queries' largest weights.
    """
    num_layers, num_heads, size, _ = weights_LHTS.shape
    sharpness_LH = weights_LHTS.nan_to_num().amax(-1)[..., size // 2 :].mean(-1)
    every = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    every.sort(key=lambda head: -float(sharpness_LH[head]))
    named: dict[str, tuple[bool, float, Head]] = {}
    for head in every if scores else ():
        name, value = head_pattern(scores or {}, *head) or ("broad", 0.0)
        if name != "broad" and value > named.get(name, (True, 0.0))[1]:
            named[name] = name not in RESTING_PATTERNS, value, head
    first = [head for _, _, head in sorted(named.values(), reverse=True)]
    return first + [head for head in every if head not in first]


def _note(maps: AttentionMaps, shown: int) -> str:
    """How to read the picture, and how many of the heads it has."""
    total = maps.weights_LHTS.shape[0] * maps.weights_LHTS.shape[1]
    rows = "row: the word that reads, column: the word it looks at"
    return rows if shown == total else f"{rows}; {shown} of {total} heads"


def heads_picture(importance_LH: Tensor, scores: HeadScores, step: int | None) -> bytes:
    """A PNG of the importance of each head: the darker, the more bits per byte its ablation costs.

    Heads whose ablation improves the model are as pale as those whose ablation changes nothing.
    """
    num_layers, num_heads = importance_LH.shape
    width, height, left, top = 120, 34, MARGIN + 58, MARGIN + 78
    canvas = np.zeros((top + num_layers * (height + 46) + MARGIN, max(left + num_heads * (width + GAP), 760)), np.uint8)
    note = "the rise of held-out bits per byte when this head alone is switched off"
    _draw_title(canvas, step, "importance of each head", note)
    largest = max(float(importance_LH.max()), 1e-9)
    for layer in range(num_layers):
        y = top + layer * (height + 46)
        _paste(canvas, _text_patch(f"layer {layer}", 13), MARGIN, y + height // 2 - 8)
        for head in range(num_heads):
            x, value = left + head * (width + GAP), float(importance_LH[layer, head])
            share = max(value, 0.0) / largest
            canvas[y : y + height, x : x + width] = FIRST_WEIGHT + round(share**0.5 * (NUM_WEIGHTS - 1))
            _paste(canvas, _text_patch(f"{value:+.4f}", 12), x, y + height + 2)
            label = _text_patch(describe_head(scores, layer, head), 12, first_ink=FIRST_ACCENT)
            _paste(canvas, label, x, y + height + 18)
    for head in range(num_heads):
        _paste(canvas, _text_patch(f"head {head}", 13), left + head * (width + GAP), top - 22)
    return _png(canvas)


def alignment_picture(alignment: Alignment, step: int | None) -> bytes:
    """A PNG of the source words (columns) each target word (row) looks at: the darker, the larger the share."""
    cell = 22
    rows, columns = (
        [_text_patch(word.translate(REPLACEMENTS), 13, 2 * MAX_LABEL) for word in words[:MAX_ALIGNED_WORDS]]
        for words in (alignment.target, alignment.source)
    )
    left, top = MARGIN + _widest(rows) + 8, MARGIN + 44 + _widest(columns) + 8
    width = max(left + len(columns) * cell + MARGIN, 480)
    canvas = np.zeros((top + len(rows) * cell + MARGIN, width), np.uint8)
    note = "rows: words of the target; columns: words of the source"
    _draw_title(canvas, step, "source words of each target word", note)
    shares_TS = alignment.weights_TS[: len(rows), : len(columns)].nan_to_num().clamp(0, 1).sqrt().numpy()
    blocks = (FIRST_WEIGHT + np.round(shares_TS * (NUM_WEIGHTS - 1))).astype(np.uint8)
    area = blocks.repeat(cell, 0).repeat(cell, 1)
    canvas[top : top + area.shape[0], left : left + area.shape[1]] = area
    _draw_row_labels(canvas, rows, left - 8, top, cell)
    for column, upright in enumerate(map(np.rot90, columns)):
        x = left + column * cell + (cell - upright.shape[1]) // 2
        _paste(canvas, upright, x, top - 8 - upright.shape[0])
    return _png(canvas)


def _blocks(weights_LHTS: Tensor, heads: Sequence[Head], num_columns: int) -> tuple[list[Pixels], int]:
    """Palette indices of each head's weights, (blocks, blocks), background above the diagonal; pixels per block."""
    num_tokens = weights_LHTS.shape[-1]
    side = (MAX_WIDTH - 2 * MARGIN - MAX_LABEL) // num_columns - GAP
    # A variant of attention may have negative weights.
    chosen_HTS = torch.stack([weights_LHTS[head] for head in heads]).float().nan_to_num().clamp(0, 1)
    chosen_HTS = F.max_pool2d(chosen_HTS[None], -(-num_tokens // side), ceil_mode=True)[0]
    size = chosen_HTS.shape[-1]
    blocks = (chosen_HTS.sqrt() * (NUM_WEIGHTS - 1) + FIRST_WEIGHT + 0.5).numpy().astype(np.uint8)
    blocks[..., ~np.tri(size, dtype=bool)] = BACKGROUND_INDEX
    return list(blocks), min(max(side // size, 1), MAX_CELL)


def _widest(patches: Sequence[Pixels]) -> int:
    return max((patch.shape[1] for patch in patches), default=0)


def _draw_title(canvas: Pixels, step: int | None, title: str, note: str, size: int = 16) -> None:
    prefix = "" if step is None else f"step {step}     "
    _paste(canvas, _text_patch(prefix + title, size, canvas.shape[1] - 2 * MARGIN), MARGIN, MARGIN - 6)
    _paste(canvas, _text_patch(note, size - 3), MARGIN, MARGIN + size + 2)


def _draw_row_labels(canvas: Pixels, labels: Sequence[Pixels], right: int, top: int, cell: int) -> None:
    for row, patch in enumerate(labels):
        _paste(canvas, patch, right - patch.shape[1], top + row * cell + (cell - patch.shape[0]) // 2)


def _draw_colour_bar(canvas: Pixels, top: int) -> None:
    left, width = MARGIN + 66, 260
    ramp = FIRST_WEIGHT + np.linspace(0, NUM_WEIGHTS - 1, width).astype(np.uint8)
    canvas[top : top + 14, left : left + width] = ramp
    _paste(canvas, _text_patch("weight", 16), MARGIN, top - 4)
    for weight in (0, 0.05, 0.25, 0.5, 1):
        label = _text_patch(f"{weight:g}", 15)
        _paste(canvas, label, left + round(weight**0.5 * (width - 1)) - label.shape[1] // 2, top + 15)


def _paste(canvas: Pixels, patch: Pixels, x: int, y: int) -> None:
    """Draw a patch with its top left corner at (x, y), clipped at the edges; the larger palette index wins."""
    x, y = max(x, 0), max(y, 0)
    area = canvas[y : y + patch.shape[0], x : x + patch.shape[1]]
    np.maximum(area, patch[: area.shape[0], : area.shape[1]], out=area)


def _token_patch(token: str, size: int) -> Pixels:
    return _text_patch(token.strip().translate(REPLACEMENTS) or "_" * len(token), size, MAX_LABEL)


@lru_cache(maxsize=4096)
def _text_patch(text: str, size: int, max_width: int = MAX_SIDE, first_ink: int = FIRST_INK) -> Pixels:
    """Text as palette indices, one line high, truncated with "…" at `max_width` pixels."""
    font, text = _font_for(text[:400], size)
    if font.getlength(text) > max_width:
        fitting = bisect(range(len(text)), float(max_width), key=lambda end: font.getlength(text[:end] + "…")) - 1
        text = text[: max(fitting, 0)].rstrip() + "…"
    ascent, descent = font.getmetrics()
    patch = np.zeros((ascent + descent, max(int(np.ceil(font.getlength(text))), 1)), np.uint8)
    mask, (x, y) = font.getmask2(text, "L")
    if 0 not in mask.size:
        coverage = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[1], mask.size[0])
        coverage = coverage[:, max(-x, 0) :]
        indices = np.where(coverage > 3, first_ink + coverage // (256 // NUM_INKS), BACKGROUND_INDEX)
        _paste(patch, indices.astype(np.uint8), x, y)
    return patch


def _font_for(text: str, size: int) -> tuple[FreeTypeFont, str]:
    """The best font for `text`, and `text` with each character that it lacks replaced by its code point."""
    text = "".join(character if character.isprintable() else " " for character in text)
    font = _fonts(size)[0]
    if not all(_has(font, character) for character in text):
        font = max(_fonts(size), key=lambda candidate: sum(_has(candidate, character) for character in text))
    return font, "".join(character if _has(font, character) else f"U+{ord(character):04X}" for character in text)


@lru_cache
def _fonts(size: int) -> list[FreeTypeFont]:
    """Pillow's own font, which covers little more than ASCII, and fonts with a broad coverage on this system."""
    from PIL import ImageFont

    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    fonts = [own]
    for name in ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc", "msgothic.ttc"):
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this system
            continue
    return fonts


@lru_cache(maxsize=8192)
def _has(font: FreeTypeFont, character: str) -> bool:
    """Whether the font draws the character as anything but its placeholder for missing characters."""
    if character == " ":
        return True
    missing, drawn = font.getmask("\uffff"), font.getmask(character)
    return 0 not in drawn.size and (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


@lru_cache
def _palette() -> bytes:
    weights = np.linspace(0, len(RAMP) - 1, NUM_WEIGHTS)
    inks = np.linspace(0, 1, NUM_INKS)[:, None]
    colours = np.empty((256, 3))
    colours[BACKGROUND_INDEX] = BACKGROUND
    for channel, values in enumerate(np.array(RAMP).T):
        colours[FIRST_WEIGHT : FIRST_WEIGHT + NUM_WEIGHTS, channel] = np.interp(weights, range(len(RAMP)), values)
    for first, colour in ((FIRST_INK, INK), (FIRST_ACCENT, ACCENT)):
        colours[first : first + NUM_INKS] = inks * np.array(colour) + (1 - inks) * np.array(BACKGROUND)
    return colours.round().astype(np.uint8).tobytes()


def _png(canvas: Pixels) -> bytes:
    from PIL import Image

    image = Image.fromarray(canvas)
    image.putpalette(_palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
