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
import torch.nn.functional as F
from torch import Tensor

from minitf.interpretability.alignment import Alignment
from minitf.interpretability.attention_maps import AttentionMaps
from minitf.interpretability.heads import HeadScores, describe_head

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MAX_SIDE, MAX_UNLABELLED_SIDE = 2400, 1500  # pixels; larger pictures slow TensorBoard down and fit no screen
MAX_CELL, MIN_LABELLED_CELL = 20, 8  # pixels per token; below the minimum, token labels are unreadable
MIN_PANEL = 112  # pixels; fits the widest label of a head
GAP, MARGIN = 14, 16
MAX_LABEL = 84  # pixels of a token label
MAX_ALIGNED_WORDS = 90  # per side

BACKGROUND, INK, ACCENT = (252, 252, 253), (28, 26, 36), (160, 32, 111)  # as TensorBoard's own page: light
REPLACEMENTS = str.maketrans({"⏎": "\\n", "⇥": "\\t", "⟨": "<", "⟩": ">"})  # Pillow's font lacks these
# Evenly falling lightness (after Matplotlib's "inferno"), from weight 0 to weight 1; the viewer's own colours.
# fmt: off
RAMP = [(243, 241, 246), (252, 222, 170), (250, 170, 92), (232, 98, 78),
        (186, 54, 110), (124, 32, 124), (70, 24, 104), (28, 14, 50)]
# fmt: on
BACKGROUND_INDEX, FIRST_WEIGHT, NUM_WEIGHTS = 0, 1, 127
FIRST_INK, FIRST_ACCENT, NUM_INKS = 128, 192, 64


def attention_picture(maps: AttentionMaps, scores: HeadScores | None = None) -> bytes:
    """A PNG of the weights of all heads, labelled by `scores` (default: those of `maps`).

    The colour of a cell shows the square root of the weight, so that a head that spreads its attention is not just
    pale; the colour bar is labelled with weights. Texts too long to draw at one pixel per token show the largest weight
    of a block.
    """
    scores = maps.scores if scores is None else scores
    blocks_LHTS, cell = _blocks(maps)
    num_layers, num_heads, size, _ = blocks_LHTS.shape
    labelled = cell >= MIN_LABELLED_CELL
    tokens = [_token_patch(token, min(cell + 1, 12)) for token in maps.tokens] if labelled else []
    token_width = _widest(tokens)

    left, top = MARGIN + 58 + token_width + 6, MARGIN + 78
    pitch_x, pitch_y = max(size * cell, MIN_PANEL) + GAP, size * cell + (24 if scores else 0) + GAP
    bottom = top + num_layers * pitch_y
    canvas = np.zeros((bottom + token_width + MARGIN, max(left + num_heads * pitch_x - GAP + MARGIN, 640)), np.uint8)
    note = "rows: the reading word (query); columns: the words it looks at (key)"
    bar_left = _draw_colour_bar(canvas)
    _draw_title(canvas, maps.step, " ".join(maps.text.split()), note, bar_left - 2 * MARGIN - 48)
    for layer in range(num_layers):
        y = top + layer * pitch_y + (20 if scores else 0)
        _paste(canvas, _text_patch(f"layer {layer}", 13), MARGIN, y + size * cell // 2 - 8)
        _draw_row_labels(canvas, tokens, left - 6, y, cell)
        for head in range(num_heads):
            x = left + head * pitch_x
            canvas[y : y + size * cell, x : x + size * cell] = blocks_LHTS[layer, head].repeat(cell, 0).repeat(cell, 1)
            if scores:
                _paste(canvas, _text_patch(describe_head(scores, layer, head), 12, first_ink=FIRST_ACCENT), x, y - 18)
    for head in range(num_heads):
        x = left + head * pitch_x
        _paste(canvas, _text_patch(f"head {head}", 13), x, top - 22)
        for column, upright in enumerate(map(np.rot90, tokens)):
            _paste(canvas, upright, x + column * cell + (cell - upright.shape[1]) // 2, bottom - GAP + 5)
    return _png(canvas)


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


def _blocks(maps: AttentionMaps) -> tuple[Pixels, int]:
    """Palette indices of the weights, (L, H, blocks, blocks), background above the diagonal, and pixels per block."""
    weights_LHTS = maps.weights_LHTS.nan_to_num().clamp(0, 1)  # a variant of attention may have negative ones
    num_layers, num_heads, num_tokens, _ = weights_LHTS.shape
    side = _panel_side(num_layers, num_heads, MAX_SIDE)
    if side // num_tokens < MIN_LABELLED_CELL:
        side = _panel_side(num_layers, num_heads, MAX_UNLABELLED_SIDE)
    weights_LHTS = F.max_pool2d(weights_LHTS, -(-num_tokens // side), ceil_mode=True)
    size = weights_LHTS.shape[-1]
    blocks = (weights_LHTS.sqrt() * (NUM_WEIGHTS - 1) + FIRST_WEIGHT + 0.5).numpy().astype(np.uint8)
    blocks[..., ~np.tri(size, dtype=bool)] = BACKGROUND_INDEX
    return blocks, min(max(side // size, 1), MAX_CELL)


def _panel_side(num_layers: int, num_heads: int, max_side: int) -> int:
    return max(min((max_side - 180) // num_heads - GAP, (max_side - 180) // num_layers - GAP - 24), 1)


def _widest(patches: Sequence[Pixels]) -> int:
    return max((patch.shape[1] for patch in patches), default=0)


def _draw_title(canvas: Pixels, step: int | None, title: str, note: str, max_width: int = MAX_SIDE) -> None:
    prefix = "" if step is None else f"step {step}     "
    _paste(canvas, _text_patch(prefix + title, 16, max_width), MARGIN, MARGIN - 4)
    _paste(canvas, _text_patch(note, 12), MARGIN, MARGIN + 20)


def _draw_row_labels(canvas: Pixels, labels: Sequence[Pixels], right: int, top: int, cell: int) -> None:
    for row, patch in enumerate(labels):
        _paste(canvas, patch, right - patch.shape[1], top + row * cell + (cell - patch.shape[0]) // 2)


def _draw_colour_bar(canvas: Pixels) -> int:
    """Returns its left edge."""
    left: int = canvas.shape[1] - MARGIN - 200
    ramp = FIRST_WEIGHT + np.linspace(0, NUM_WEIGHTS - 1, 190).astype(np.uint8)
    canvas[MARGIN : MARGIN + 10, left : left + 190] = ramp
    for weight in (0, 0.05, 0.25, 0.5, 1):
        label = _text_patch(f"{weight:g}", 10)
        _paste(canvas, label, left + round(weight**0.5 * 189) - label.shape[1] // 2, MARGIN + 13)
    _paste(canvas, _text_patch("weight", 10), left - 42, MARGIN - 2)
    return left


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
