"""Alignment: words and their tokens, the choice of heads, and a model in which alignment emerges."""

import json
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
from helpers import rows

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.data.config import DataConfig
from minitf.data.tokenized_pairs import prepare_pairs
from minitf.data.tokenizer_training import train_tokenizer
from minitf.evaluate import pairs_of
from minitf.interpretability.alignment import NUM_TESTED, Units, align_from, causal_alignment, find_aligning_heads
from minitf.interpretability.attention_maps import maps_of_checkpoint
from minitf.interpretability.picture import alignment_picture
from minitf.tokenizer import Tokenizer, TokenizerConfig


def members(units: Units) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in units.members_NT]


def test_tokens_are_assigned_to_their_words() -> None:
    t = train_tokenizer(TokenizerConfig(kind="byte"), [], for_pairs=True)
    units = Units.of(t, "he’s ab, é")
    assert units.names == ["he’s", "ab", ",", "é"]
    # bytes: h e ’’’ s space a b , space é é
    assert members(units) == [[0, 1, 2, 3, 4, 5], [7, 8], [9], [11, 12]]


def test_a_leading_space_belongs_to_its_word(tokenizer: Tokenizer) -> None:
    text = "The cat sat on the mat."
    units = Units.of(tokenizer, text)
    assert units.names == ["The", "cat", "sat", "on", "the", "mat", "."]
    pieces = tokenizer.pieces(tokenizer.encode(text))
    joined = ["".join(pieces[token] for token in row).strip() for row in members(units)]
    assert joined == units.names


def test_units_of_a_character_tokenizer_are_characters() -> None:
    t = train_tokenizer(TokenizerConfig(kind="char"), ["abc"], for_pairs=True)
    assert Units.of(t, "cab").names == ["c", "a", "b"]


def test_a_target_word_is_aligned_at_the_position_that_predicts_it() -> None:
    """A head that looks from the predicting position at the same token in the source gives the identity matrix."""
    t = train_tokenizer(TokenizerConfig(kind="char"), ["abc"], for_pairs=True)
    T = 2 + 3 + 3  # <|source|> a b c <|target|> a b c
    weights = torch.zeros(2, 1, T, T)
    for step in range(3):
        weights[1, 0, 4 + step, 1 + step] = 0.5
        weights[1, 0, 4 + step, 0] = 0.5
    found = align_from(weights, t, "abc", "abc", [(1, 0)])
    torch.testing.assert_close(found.weights_TS, torch.eye(3))
    assert found.describe() == "a   b   c"
    assert align_from(weights, t, "abc", "abc", [(0, 0)]).weights_TS.sum() == 0


def test_alignment_emerges_and_its_heads_are_found(copying_run: Path) -> None:
    rows = [json.loads(line) for line in (copying_run / "metrics.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows if row["split"] == "alignment"]
    assert scores[0] < 0.6
    assert max(scores[-3:]) > 0.9  # of 59 letters; single steps may miss a few
    checkpoint = load_checkpoint(copying_run)
    assert checkpoint.aligning_heads
    # Rounding differs between processors, and after 400 steps a head may still miss a letter: four of thirty may.
    aligned = []
    for word in ("cabd", "dbac", "bacd", "cdab", "ddbca", "adcab", "bcad"):
        found = maps_of_checkpoint(checkpoint, word).alignment
        assert found is not None
        assert found.source == list(word)
        assert found.weights_TS.shape == (len(found.target), len(word))
        aligned += [source == place for place, source in enumerate(found.weights_TS.argmax(-1).tolist())]
    assert sum(aligned) >= 26
    maps = maps_of_checkpoint(checkpoint, "cabd")
    assert maps.alignment is not None
    assert maps.to_json()["alignment"] == maps.to_viewer()["alignment"]
    picture = alignment_picture(maps.alignment, 3)
    assert picture.startswith(b"\x89PNG")
    # A given target is aligned instead of the answer.
    other = maps_of_checkpoint(checkpoint, "cabd => dbac").alignment
    assert other is not None
    assert other.target == list("dbac")


def test_aligning_heads_are_scored_on_held_out_pairs(copying_run: Path) -> None:
    checkpoint = load_checkpoint(copying_run)
    data = DataConfig(**checkpoint.state["data"])
    pairs = prepare_pairs(data, TokenizerConfig(), checkpoint.tokenizer)
    model = checkpoint.model
    found = find_aligning_heads(model, checkpoint.tokenizer, pairs.val, range(40))
    best = divmod(int(found.scores_LH.argmax()), model.config.num_heads)
    assert found.heads[0] == best
    assert found.score > 0.9 > 3 * found.chance
    torch.nn.init.zeros_(model.model.embed_tokens.weight)  # type: ignore[arg-type, union-attr]
    nothing = find_aligning_heads(model, checkpoint.tokenizer, pairs.val, range(40))
    assert nothing.score < 0.6


def test_a_run_on_pairs_logs_to_tensorboard(copying_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def events_of(folder: str) -> EventAccumulator:
        return EventAccumulator(str(copying_run / folder), {"images": 0, "tensors": 0, "scalars": 0}).Reload()

    quality = {f"quality/{name}" for name in ("alignment", "chrf", "bleu", "exact_match")}
    assert quality <= set(events_of("held_out").Tags()["scalars"])
    assert events_of("chance").Tags()["scalars"] == ["quality/alignment"]
    events = events_of("")
    assert any(tag.startswith("pictures/alignment/") for tag in events.Tags()["images"])
    table = events.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.startswith("| source | answer | reference |")
    source, answer, reference = (cell.strip() for cell in table.splitlines()[2].strip("| ").split("|"))
    assert source == reference
    assert SequenceMatcher(None, answer, reference).ratio() > 0.7


@pytest.mark.parametrize("text", ["", "cabd => "])
def test_empty_sources_and_targets_are_no_error(copying_run: Path, text: str) -> None:
    maps = maps_of_checkpoint(load_checkpoint(copying_run), text)
    assert maps.weights_LHTS.isfinite().all()


def test_an_endless_answer_is_cut_at_the_context(copying_run: Path) -> None:
    checkpoint = load_checkpoint(copying_run)
    with torch.no_grad():  # a model for which the end token is the least likely
        checkpoint.model.vocabulary_VD[checkpoint.tokenizer.end_id] = -checkpoint.model.vocabulary_VD.mean(0)
        checkpoint.model.model.norm.weight.zero_()
        checkpoint.model.model.norm.weight[0] = 1e-3
    maps = maps_of_checkpoint(checkpoint, "cabd")
    assert len(maps.ids) <= checkpoint.model.config.context_length
    assert len(maps.ids) > len(checkpoint.tokenizer.encode_prompt("cabd")) + 4


def test_a_word_changes_when_it_may_not_look_at_its_origin(copying_run: Path) -> None:
    checkpoint = load_checkpoint(copying_run)
    val = pairs_of(checkpoint).val
    found = causal_alignment(checkpoint.model, checkpoint.tokenizer, val, range(60))
    assert found is not None
    assert found.num_words == NUM_TESTED
    assert found.changed > 0.5
    assert found.control < found.changed - 0.3
    row = [row for row in rows(copying_run) if row["split"] == "alignment"][-1]
    assert {"changed", "changed_error", "control", "control_error", "num_words"} <= row.keys()
