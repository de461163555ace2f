"""Packed pairs: none lost, none cut silently, none sees another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitf.data.batches import IGNORED, Batch
from minitf.data.config import DataConfig
from minitf.data.packing import PairBatches, fit, held_out_pairs, pack
from minitf.data.tokenized_pairs import TokenizedPairs, prepare_pairs
from minitf.errors import RequestError
from minitf.loss import linear_cross_entropy
from minitf.tokenizer import Tokenizer, TokenizerConfig

BYTE = TokenizerConfig(kind="byte")


def quiet(line: str) -> None:
    pass


def data_of(tmp_path: Path, rows: list[tuple[str, str]], **settings: Any) -> DataConfig:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows), encoding="utf-8")
    cache = str(tmp_path / "cache")
    return DataConfig(kind="pairs", source="files", files=[str(path)], cache_dir=cache, **settings)


def some_rows(count: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [(f"{i} " + "p" * int(rng.integers(1, 12)), "c" * int(rng.integers(1, 9)) + "é") for i in range(count)]


@pytest.fixture
def pairs(tmp_path: Path) -> TokenizedPairs:
    return prepare_pairs(data_of(tmp_path, some_rows(200)), BYTE, log=quiet)


def pairs_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every pair in a batch."""
    assert batch.segments_BT is not None
    found = []
    for inputs, targets, segments in zip(batch.inputs_BT, batch.targets_BT, batch.segments_BT, strict=True):
        for number in range(1, int(segments.max()) + 1):
            found.append((inputs[segments == number].tolist(), targets[segments == number].tolist()))
    return found


def test_ids_are_the_pair_between_its_marks(pairs: TokenizedPairs) -> None:
    t = pairs.tokenizer
    source, target = pairs.train.texts(0, t)
    assert (source, target) == some_rows(200)[0]
    ids, prompt_length = pairs.train.pair(0)
    assert ids.tolist() == [*t.encode_prompt(source), *t.encode(target), t.end_id]
    assert prompt_length == len(t.encode_prompt(source))
    assert pairs.train.completion_bytes[0] == len(target.encode())
    assert (len(pairs.train), len(pairs.val)) == (180, 20)


def test_prepared_pairs_are_cached_and_repaired(tmp_path: Path) -> None:
    lines: list[str] = []
    data = data_of(tmp_path, some_rows(40))
    first, second = prepare_pairs(data, BYTE, log=lines.append), prepare_pairs(data, BYTE, log=lines.append)
    assert len(lines) == 2
    assert np.array_equal(first.train.ids, second.train.ids)
    expected = first.train.ids.tolist()
    damaged = first.directory / "train_ids.bin"
    damaged.write_bytes(b"short")
    assert prepare_pairs(data, BYTE, log=lines.append).train.ids.tolist() == expected
    assert "damaged" in lines[2]


def test_an_epoch_takes_every_pair_once_with_targets_in_its_completion(pairs: TokenizedPairs) -> None:
    batches = PairBatches(pairs.train, DataConfig(kind="pairs", source="copy"), 64, 1, seed=1)
    seen = [one for index in range(batches.windows_per_epoch) for one in pairs_of(batches.batch(index))]
    expected = []
    for index in range(len(pairs.train)):
        ids, prompt_length = pairs.train.pair(index)
        targets = [IGNORED] * (prompt_length - 1) + ids[prompt_length:].tolist()
        expected.append((ids[:-1].tolist(), targets))
    assert sorted(seen) == sorted(expected)
    again = [one for index in range(batches.windows_per_epoch) for one in pairs_of(batches.batch(index))]
    later = range(batches.windows_per_epoch, 2 * batches.windows_per_epoch)
    second = [one for index in later for one in pairs_of(batches.batch(index))]
    assert seen == again
    assert seen != second
    assert sorted(second) == sorted(seen)


def test_packed_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(67, 28, size=20_000), 9, 227).astype(np.int32)
    patterns = pack(lengths, 256)
    used = [length for pattern, times in patterns for length in pattern * times]
    assert sorted(used) == sorted(lengths.tolist())
    assert all(sum(pattern) <= 256 for pattern, _ in patterns)
    assert lengths.sum() / (256 * sum(times for _, times in patterns)) > 0.95


def test_long_pairs_are_reported_and_dropped_or_truncated(tmp_path: Path) -> None:
    rows = [(f"{text}{i}", completion) for i in range(10) for text, completion in (
        ("shor", "one"), ("s" * 9, "c" * 60), ("p" * 79, "c"),
    )]  # fmt: skip
    pairs = prepare_pairs(data_of(tmp_path, rows), BYTE, log=quiet).train
    lengths, report = fit(pairs, 32, "drop")
    assert set(lengths.tolist()) == {0, len("short") + len("one") + 2}
    assert "longer than the context of 32 tokens (the longest: 84): 18 left out" in report
    lengths, report = fit(pairs, 32, "truncate")
    assert sorted(set(lengths.tolist())) == [0, 10, 32]
    assert report.endswith("9 left out, 9 cut at the end of the completion")
    data = DataConfig(kind="pairs", source="copy", long_pairs="truncate")
    batches = PairBatches(pairs, data, 32, 4, seed=0)
    cut = [targets for inputs, targets in pairs_of(batches.batch(0)) if len(inputs) == 32]
    assert cut
    assert all(targets[-1] != 256 for targets in cut)  # a cut completion has no end to learn
    with pytest.raises(RequestError, match=r"none of 27 pairs fits into model\.context_length=4"):
        fit(pairs, 4, "drop")


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_packed_pairs_do_not_see_each_other(pairs: TokenizedPairs, make_model: Any, attention: str) -> None:
    model = make_model(vocab_size=pairs.tokenizer.vocab_size, context_length=64, attention=attention)
    batch = PairBatches(pairs.train, DataConfig(kind="pairs", source="copy"), 64, 3, seed=0).batch(0)
    assert batch.segments_BT is not None
    whole = model.hidden(batch.inputs_BT, segments_BT=batch.segments_BT)
    for row, segments in enumerate(batch.segments_BT):
        for number in range(1, int(segments.max()) + 1):
            inside = segments == number
            alone = model.hidden(batch.inputs_BT[row][inside][None])
            torch.testing.assert_close(whole[row][inside], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.hidden(batch.inputs_BT)[0, -1], whole[0, -1], atol=1e-3)  # the mask matters


def test_prompt_loss_share_weighs_prompt_tokens(pairs: TokenizedPairs, make_model: Any) -> None:
    model = make_model(vocab_size=pairs.tokenizer.vocab_size, context_length=64)
    data = DataConfig(kind="pairs", source="copy", prompt_loss_share=0.25)
    batch = PairBatches(pairs.train, data, 64, 3, seed=0).batch(0)
    logits_BTV = model(batch.inputs_BT) if batch.segments_BT is None else None
    x_BTD = model.hidden(batch.inputs_BT, segments_BT=batch.segments_BT)
    logits_BTV = x_BTD @ model.vocabulary_VD.T
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    assert batch.weights_BT is not None
    weights = batch.weights_BT.flatten()
    assert set(weights.tolist()) == {0.0, 0.25, 1.0}
    torch.testing.assert_close(model.loss(*batch), (losses * weights).sum() / weights.sum())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_skipping_ignored_targets_keeps_loss_and_gradients(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import minitf.loss

    monkeypatch.setattr(minitf.loss, "CHUNK_LOGITS", 40 * 8)  # chunks of eight rows
    torch.manual_seed(0)
    x, words = torch.randn(4, 25, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (4, 25)).masked_fill(torch.rand(4, 25) >= share, IGNORED)
    loss = linear_cross_entropy(x, words, targets)
    loss.backward()
    mine = (x.grad.clone(), words.grad.clone())  # type: ignore[union-attr]
    x.grad = words.grad = None
    if share:
        expected = torch.nn.functional.cross_entropy((x @ words.T).flatten(0, 1), targets.flatten())
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(mine, (x.grad, words.grad))
    else:
        assert loss == 0


def test_held_out_pairs_come_once_in_order(pairs: TokenizedPairs) -> None:
    lengths, _ = fit(pairs.val, 64, "drop")
    batches = list(held_out_pairs(pairs.val, lengths, range(len(pairs.val)), 64, 2))
    seen = [inputs for batch in batches for inputs, _ in pairs_of(batch)]
    assert seen == [pairs.val.pair(index)[0][:-1].tolist() for index in range(len(pairs.val))]


def test_a_given_tokenizer_is_used_for_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    marked = tokenizer.for_pairs()
    assert marked.vocab_size == tokenizer.vocab_size + 2
    assert marked.encode("The cat") == tokenizer.encode("The cat")
    found = prepare_pairs(data_of(tmp_path, some_rows(40)), BYTE, marked, log=quiet)
    assert found.tokenizer.to_json() == marked.to_json()
    assert found.train.texts(1, found.tokenizer) == some_rows(40)[1]


def test_marks_in_a_text_are_plain_text(tmp_path: Path) -> None:
    rows = [(f"<|source|> {i} <|target|>", "b <|endoftext|>") for i in range(20)]
    found = prepare_pairs(data_of(tmp_path, rows), BYTE, log=quiet)
    assert found.train.texts(0, found.tokenizer)[0]
    ids, prompt_length = found.train.pair(0)
    t = found.tokenizer
    assert [i for i, id_ in enumerate(ids.tolist()) if id_ in (t.source_id, t.target_id, t.end_id)] == [
        0, prompt_length - 1, len(ids) - 1,
    ]  # fmt: skip
