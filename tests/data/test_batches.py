"""Batches of text: nothing lost, nothing twice, the same again after a restart."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import train_here

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.data.batches import IGNORED, Batches, document_segments, evenly_spaced, held_out_batches
from minitf.errors import RequestError
from minitf.evaluate import evaluate, evaluate_checkpoint, held_out_part
from minitf.model import Transformer


@pytest.mark.parametrize(
    ("num_tokens", "length", "batch_size"), [(1000, 16, 4), (1000, 7, 5), (17, 16, 3), (40, 16, 8)]
)
def test_targets_are_the_next_tokens_of_the_text(num_tokens: int, length: int, batch_size: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    train = Batches(tokens, length, batch_size, seed=0)
    for index in range(50):
        inputs_BT, targets_BT, *_ = train.batch(index)
        assert inputs_BT.shape == targets_BT.shape == (batch_size, length)
        assert inputs_BT.dtype == targets_BT.dtype == torch.int64
        assert inputs_BT.is_contiguous()
        assert targets_BT.is_contiguous()
        assert torch.equal(targets_BT, inputs_BT + 1)  # ids count up: the next token is the next number
        assert torch.equal(inputs_BT, inputs_BT[:, :1] + torch.arange(length))
        assert inputs_BT.min() >= 0
        assert targets_BT.max() < num_tokens


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(1000, 7), (1000, 200), (1003, 6)])
def test_an_epoch_takes_every_window_once(num_tokens: int, batch_size: int) -> None:
    length = 16
    train = Batches(np.arange(num_tokens, dtype=np.uint16), length, batch_size, seed=3)
    num_windows = train.windows_per_epoch
    assert num_windows == (num_tokens - length) // length
    assert train.tokens_per_epoch == num_windows * length
    num_batches = -(-4 * num_windows // batch_size)
    starts = torch.cat([train.batch(index)[0][:, 0] for index in range(num_batches)])
    epochs = [starts[i * num_windows : (i + 1) * num_windows].tolist() for i in range(4)]
    for epoch in epochs:
        offset = min(epoch)
        assert sorted(epoch) == list(range(offset, offset + num_windows * length, length))
        assert epoch != sorted(epoch)
    assert len({min(epoch) for epoch in epochs}) > 1  # epochs are cut from different offsets
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_all_tokens_become_targets_within_some_epochs() -> None:
    train = Batches(np.arange(100, dtype=np.uint16), 16, 5, seed=0)
    seen = {token for index in range(400) for token in train.batch(index)[1].flatten().tolist()}
    assert seen == set(range(1, 100))


def test_a_batch_depends_only_on_seed_and_index() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    one = Batches(tokens, 32, 6, seed=1)
    in_order = [one.batch(index) for index in range(100)]
    other = Batches(tokens, 32, 6, seed=1)
    for index in random.Random(0).sample(range(100), 100):
        assert all(torch.equal(a, b) for a, b in zip(other.batch(index)[:2], in_order[index][:2], strict=True))
    assert not torch.equal(Batches(tokens, 32, 6, seed=2).batch(0)[0], in_order[0][0])
    assert Batches(tokens, 32, 6, seed=-1).batch(0)[0].shape == (6, 32)


def test_text_shorter_than_a_context_is_refused() -> None:
    with pytest.raises(RequestError, match=r"has 128 tokens.*need 129.*model\.context_length"):
        Batches(np.zeros(128, dtype=np.uint16), 128, 4, seed=0)
    inputs_BT, targets_BT, *_ = Batches(np.arange(129, dtype=np.uint16), 128, 2, seed=0).batch(0)
    assert inputs_BT[0].tolist() == list(range(128))
    assert targets_BT[1, -1] == 128


# Held-out batches


def test_evenly_spaced_indices() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3).tolist() == evenly_spaced(3, 3).tolist() == evenly_spaced(3, 9).tolist() == [0, 1, 2]
    assert evenly_spaced(0, 5).tolist() == []


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 18, 33, 1000, 1025])
def test_held_out_batches_cover_every_target_once(num_tokens: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    targets: list[int] = []
    for inputs_BT, targets_BT, *_ in held_out_batches(tokens, 16, batch_size=5):
        assert inputs_BT.shape == targets_BT.shape
        assert inputs_BT.shape[0] <= 5
        counted = targets_BT != IGNORED
        assert torch.equal(targets_BT[counted], inputs_BT[counted] + 1)
        targets += targets_BT[counted].tolist()
    assert targets == list(range(1, num_tokens))


def test_max_tokens_takes_evenly_spaced_windows() -> None:
    tokens = np.arange(16 * 100 + 1, dtype=np.uint16)
    found = list(held_out_batches(tokens, 16, batch_size=4, max_tokens=16 * 10 + 3))
    starts = torch.cat([inputs_BT[:, 0] for inputs_BT, *_ in found]).tolist()
    assert starts == [i * 160 for i in range(10)]
    assert len(list(held_out_batches(tokens, 16, 4, max_tokens=10**9))) == 25
    assert sum(len(inputs_BT) for inputs_BT, *_ in held_out_batches(tokens, 16, 4, max_tokens=1)) == 1
    with pytest.raises(RequestError, match="too few"):
        list(held_out_batches(tokens[:1], 16, 4))


def documents(*lengths: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Random documents of these lengths, each ended by token 0."""
    ids = np.random.default_rng(0)
    return np.concatenate([[*ids.integers(1, 50, length - 1), 0] for length in lengths]).astype(np.uint16)


def test_segments_number_the_documents_of_each_row() -> None:
    inputs_BT = torch.tensor([[5, 6, 0, 7, 8, 9, 0, 1], [0, 0, 3, 3, 3, 3, 3, 0]])
    segments_BT = document_segments(inputs_BT, 0)
    assert segments_BT is not None
    assert segments_BT.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 3, 3, 3, 3, 3, 3]]
    assert document_segments(inputs_BT, None) is None
    tokens = documents(*[9] * 40)
    assert Batches(tokens, 16, 4, seed=0).batch(0).segments_BT is None
    batch = Batches(tokens, 16, 4, seed=0, document_end=0).batch(0)
    assert batch.segments_BT is not None
    assert torch.equal(batch.segments_BT, document_segments(batch.inputs_BT, 0))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_document_is_predicted_as_if_it_were_alone(make_model: Callable[..., Transformer]) -> None:
    model, lengths = make_model(), [9, 4, 1, 12]
    tokens = documents(*lengths)
    targets = np.append(tokens[1:], np.uint16(7))
    ids_BT, targets_BT = (torch.from_numpy(values.astype(np.int64))[None] for values in (tokens, targets))
    together = float(model.loss(ids_BT, targets_BT, document_segments(ids_BT, 0))) * len(tokens)
    ends = np.cumsum(lengths)
    alone = sum(
        float(model.loss(ids_BT[:, end - length : end], targets_BT[:, end - length : end])) * length
        for end, length in zip(ends, lengths, strict=True)
    )
    assert together == pytest.approx(alone, rel=1e-5)
    assert together != pytest.approx(float(model.loss(ids_BT, targets_BT)) * len(tokens), rel=1e-3)
    found = evaluate(model.loss, np.append(tokens, np.uint16(7)), 99, 26, 3, model.device, document_end=0)
    assert found.loss == pytest.approx(alone / len(tokens), rel=1e-5)


def test_a_checkpoint_is_evaluated_as_it_was_trained(workdir: Path, tiny: list[str]) -> None:
    masked, own = ["data.document_mask=true", "run_dir=masked"], [w for w in tiny if not w.startswith("data")]
    rows = "".join(json.dumps({"text": f"The cat sat on mat {number}."}) + "\n" for number in range(80))
    (workdir / "text.jsonl").write_text(rows, encoding="utf-8")
    assert train_here("data=text", "data.files=[text.jsonl]", *own, *masked, "trainer.eval_tokens=100000") == 0
    last = [json.loads(line) for line in Path("masked/metrics.jsonl").read_text().splitlines()][-1]
    checkpoint = load_checkpoint("masked")
    assert checkpoint.document_mask
    tokens, num_bytes = held_out_part(checkpoint)
    assert evaluate_checkpoint(checkpoint, tokens, num_bytes).loss == pytest.approx(last["loss"], rel=1e-4)
    del checkpoint.state["data"]["document_mask"]
    assert evaluate_checkpoint(checkpoint, tokens, num_bytes).loss != pytest.approx(last["loss"], rel=1e-4)
