"""The picture of all heads: its pixels are the weights."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import maps_of
from PIL import Image

from minitf.interpretability.heads import pattern_scores
from minitf.interpretability.picture import MAX_CELL, MAX_SIDE, MIN_PANEL, RAMP, attention_picture, telling_heads

BRIGHTEST = RAMP[-1]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_brightest_cells_are_where_the_weights_are_one() -> None:
    maps = maps_of(["one", "two", "three", "four", "five", "six"], num_layers=1, num_heads=2)
    weights = torch.full((1, 2, 6, 6), 0.01).tril()
    weights[0, 0, 3:, 2] = weights[0, 1, 5, 0] = 1.0  # head 0 is the sharper one, so it is drawn first
    image = pixels(attention_picture(replace(maps, weights_LHTS=weights)))
    bright = (image == BRIGHTEST).all(-1)
    bright[:110] = False  # the colour bar
    rows, columns = bright.nonzero()
    assert bright.sum() == 4 * MAX_CELL**2
    panel_distance = max(6 * MAX_CELL, MIN_PANEL) + 14
    right = columns >= columns.min() + panel_distance - 2 * MAX_CELL
    assert rows[right].min() - rows[~right].min() == 2 * MAX_CELL
    assert columns[~right].min() - (columns[right].min() - panel_distance) == 2 * MAX_CELL


def test_the_most_telling_heads_are_drawn() -> None:
    weights = torch.ones(2, 3, 12, 12).tril()
    weights[1, 2] = torch.cat([torch.eye(12)[:1], torch.eye(12)[:-1]])  # looks at the token before
    weights[0, 1] = torch.eye(12)  # at its own
    weights = weights / weights.sum(-1, keepdim=True)
    scores = pattern_scores(weights[:, :, None])
    order = telling_heads(weights, scores)
    assert order[:2] == [(1, 2), (0, 1)]
    assert sorted(order) == [(layer, head) for layer in range(2) for head in range(3)]


def test_cells_have_the_colour_of_their_weight() -> None:
    maps = maps_of(["a", "b", "c", "d"], num_layers=1, num_heads=1)
    steps = torch.linspace(0, 1, len(RAMP)) ** 2  # weights whose square roots are the nodes of the ramp
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 3] = steps[[1, 3, 5, 7]]
    image = pixels(attention_picture(replace(maps, weights_LHTS=weights)))[110:]
    corner = np.argwhere((image == BRIGHTEST).all(-1)).min(0)
    found = [image[corner[0] + 5, corner[1] + 5 + (column - 3) * MAX_CELL] for column in range(4)]
    np.testing.assert_allclose(found, [RAMP[i] for i in (1, 3, 5, 7)], atol=3)


def test_the_picture_changes_with_weights_scores_and_step() -> None:
    maps = maps_of(["a", "b", "c"])
    scores = pattern_scores(maps.weights_LHTS[:, :, None])
    others = [replace(maps, weights_LHTS=maps.weights_LHTS.flip(1)), replace(maps, step=11)]
    pictures = [attention_picture(one, scores) for one in (maps, *others)] + [attention_picture(maps)]
    assert len(set(pictures)) == len(pictures)
    assert attention_picture(maps, scores) == pictures[0]


@pytest.mark.parametrize(
    "tokens",
    [
        ["a"],
        ["", " ", "\n", "⏎", "\x00", "\u200b", "⟨e4⟩"],
        ["naïve", "дом", "中文", "שלום", "😀", "\ud800", "e\u0301", "\U0010ffff"],
        ["x" * 500, "y"],
        ["w"] * 30,
        ["w"] * 300,
    ],
)
def test_any_text_becomes_a_picture_of_bounded_size(tokens: list[str]) -> None:
    for num_layers, num_heads in ((1, 1), (6, 8)):
        png = attention_picture(maps_of(tokens, num_layers, num_heads))
        with Image.open(io.BytesIO(png)) as image:
            image.load()
            assert image.mode == "P"
            assert max(image.size) <= MAX_SIDE + 100


def test_nan_weights_still_make_a_picture() -> None:
    maps = maps_of(["a", "b"])
    with np.errstate(invalid="raise"):
        assert attention_picture(replace(maps, weights_LHTS=torch.full_like(maps.weights_LHTS, float("nan"))))


def test_pictures_stay_readable_with_any_number_of_heads_and_tokens() -> None:
    """TensorBoard shows a picture about 480 pixels wide."""
    for tokens in (["a", "b", "c"], ["word"] * 16, ["word"] * 40):
        png = attention_picture(maps_of(tokens, num_layers=2, num_heads=64))
        assert Image.open(io.BytesIO(png)).size[0] <= 1000
