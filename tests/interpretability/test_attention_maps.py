"""Attention maps of every head, and the scores of patterns."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import WordTokenizer, recorded_weights
from torch import Tensor, nn

from minitf.attention import AttentionRecord
from minitf.errors import MinitfError, RequestError
from minitf.interpretability.attention_maps import AttentionMaps, attention_maps
from minitf.interpretability.heads import describe_head, head_scores, pattern_scores
from minitf.model import ModelConfig, Transformer


class PatternModel(nn.Module):
    """One layer with a perfect previous-token, first-token, induction, uniform and this-token head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_length=32)
        self.vocab_size = 1000
        self.unused = nn.Parameter(torch.zeros(()))

    def hidden(self, ids_BT: Tensor, record: list[AttentionRecord], segments_BT: Tensor | None = None) -> Tensor:
        B, T = ids_BT.shape
        weights_BHTS = torch.zeros(B, 5, T, T)
        for b in range(B):
            for t in range(T):
                weights_BHTS[b, 0, t, max(t - 1, 0)] = 1
                weights_BHTS[b, 1, t, 0] = 1
                before = (ids_BT[b, :t] == ids_BT[b, t]).nonzero()
                weights_BHTS[b, 2, t, int(before[-1]) + 1 if len(before) else t] = 1
                weights_BHTS[b, 3, t, : t + 1] = 1 / (t + 1)
                weights_BHTS[b, 4, t, t] = 1
        nothing = torch.zeros(B, 5, T, 1)
        record.append(AttentionRecord(nothing, nothing, nothing, weights_BHTS, nothing))
        return torch.zeros(B, T, 1)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(num_layers=3, hidden_size=16, num_heads=2, context_length=12, dropout=0.5), 8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.train()


def random_weights(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(*shape, generator=generator) * 2
    return scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


def test_maps_are_the_weights_and_predictions_of_the_model(model: Transformer) -> None:
    maps = attention_maps(model, WordTokenizer(), "the cat sat on the mat", step=7, top_k=3)
    assert model.training
    ids_BT = torch.tensor([[0, 1, 2, 3, 0, 4]])
    with torch.no_grad():
        weights, logits_BTV = recorded_weights(model.eval(), ids_BT), model(ids_BT)
    torch.testing.assert_close(maps.weights_LHTS, torch.stack([w[0] for w in weights]))
    assert maps.weights_LHTS.shape == (3, 2, 6, 6)
    torch.testing.assert_close(maps.weights_LHTS.sum(-1), torch.ones(3, 2, 6))
    assert not maps.weights_LHTS.triu(1).any()
    assert (maps.tokens, maps.ids, maps.step) == (
        [" the", " cat", " sat", " on", " the", " mat"],
        [0, 1, 2, 3, 0, 4],
        7,
    )
    probabilities_TV = logits_BTV[0].softmax(-1)
    for t, top in enumerate(maps.next_tokens):
        likeliest = sorted(range(8), key=lambda v: -probabilities_TV[t, v])[:3]
        assert [token for token, _ in top] == WordTokenizer().pieces(likeliest)
        assert [p for _, p in top] == pytest.approx(probabilities_TV[t, likeliest].tolist())


def test_empty_and_too_long_texts_are_refused(model: Transformer) -> None:
    with pytest.raises(RequestError, match="empty"):
        attention_maps(model, WordTokenizer(), "")
    with pytest.raises(RequestError, match=r"13 tokens.*12"):
        attention_maps(model, WordTokenizer(), " ".join(["cat"] * 13))
    assert len(attention_maps(model, WordTokenizer(), " ".join(["cat"] * 12)).tokens) == 12


def test_json_weights_have_six_decimals(model: Transformer) -> None:
    maps = attention_maps(model, WordTokenizer(), "the cat sat")
    parsed = json.loads(json.dumps(maps.to_json(), allow_nan=False))
    assert parsed["weights_shape"] == {"layers": 3, "heads": 2, "queries": 3, "keys": 3}
    torch.testing.assert_close(torch.tensor(parsed["weights"]), maps.weights_LHTS, rtol=0, atol=6e-7)
    assert all(round(w, 6) == w for w in torch.tensor(parsed["weights"], dtype=torch.float64).flatten().tolist())


def test_json_of_a_diverged_model_is_refused() -> None:
    broken = AttentionMaps("a", ["a"], [0], torch.full((1, 1, 1, 1), math.nan), [[("a", 1.0)]])
    with pytest.raises(MinitfError, match="diverged"):
        broken.to_json()


def test_pattern_scores_equal_naive_loops() -> None:
    weights_HBTS = random_weights(4, 3, 9, 9)
    scores = pattern_scores(weights_HBTS)
    for h in range(4):
        entropies, previous, first = [], [], []
        for b in range(3):
            for t in range(9):
                row = weights_HBTS[h, b, t].tolist()
                if t >= 1:
                    entropies.append(-sum(w * math.log(w) for w in row if w > 0) / math.log(t + 1))
                if t >= 2:
                    previous.append(row[t - 1])
                    first.append(row[0])
        assert float(scores["entropy"][h]) == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
        assert float(scores["previous_token"][h]) == pytest.approx(sum(previous) / len(previous), abs=1e-5)
        assert float(scores["first_token"][h]) == pytest.approx(sum(first) / len(first), abs=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_short_texts_score_zero(num_tokens: int) -> None:
    scores = pattern_scores(random_weights(2, 1, num_tokens, num_tokens))
    assert scores["previous_token"].tolist() == scores["first_token"].tolist() == [0, 0]
    assert all(values.isfinite().all() for values in scores.values())


def test_scores_in_segments_are_means_over_the_tokens_of_each_text_by_itself() -> None:
    """Two texts of 9 and 12 tokens and 3 of padding in a row score as their rows apart, weighted by their tokens."""
    sizes, T = (9, 12), 24
    segments_BT = torch.tensor([[1] * sizes[0] + [2] * sizes[1] + [0] * (T - sum(sizes))])
    weights_HBTS, apart = torch.zeros(4, 1, T, T), []
    for start, size in zip((0, sizes[0]), sizes, strict=True):
        one_HBTS = random_weights(4, 1, size, size) if start else random_weights(4, 1, size, size).flip(0)
        weights_HBTS[..., start : start + size, start : start + size] = one_HBTS
        apart.append(pattern_scores(one_HBTS))
    weights_HBTS[..., sum(sizes) :, sum(sizes) :] = torch.eye(T - sum(sizes))  # padding looks at itself
    together = pattern_scores(weights_HBTS, segments_BT=segments_BT)
    first_queries = {"entropy": 1, "previous_token": 2, "first_token": 2, "this_token": 2, "nearby": 8}
    for name, first in first_queries.items():
        total = sum(scores[name] * (size - first) for scores, size in zip(apart, sizes, strict=True))
        torch.testing.assert_close(together[name], total / sum(size - first for size in sizes))


def test_a_head_that_is_sharp_where_the_loss_counts_is_not_broad() -> None:
    """A pair of 12 tokens: head 0 looks at the source sharply in the answer only, head 1 never."""
    weights_LHBTS = torch.ones(1, 2, 1, 12, 12).tril()
    weights_LHBTS /= weights_LHBTS.sum(-1, keepdim=True)
    for t in (9, 10, 11):
        weights_LHBTS[0, 0, 0, t] = torch.eye(12)[t - 6]
    targets_BT = torch.tensor([[-100] * 9 + [5, 6, 7]])
    labels = []
    for targets in (None, targets_BT):
        scores = pattern_scores(weights_LHBTS, targets, torch.ones(1, 12, dtype=torch.int32))
        labels.append([describe_head(scores, 0, head) for head in range(2)])
    assert labels == [["broad 0.73", "broad 1.00"], ["", "broad 1.00"]]


def test_constructed_heads_score_high_for_their_pattern_only() -> None:
    ids_BT = torch.arange(40).view(2, 20)  # without repetition the induction head looks at the query itself
    scores = head_scores(PatternModel(), ids_BT)
    assert {name: tuple(values.shape) for name, values in scores.items()} == dict.fromkeys(
        ("entropy", "previous_token", "first_token", "this_token", "nearby", "same_word", "induction"), (1, 5)
    )
    previous, first, induction, uniform, itself = range(5)
    table = {name: values[0].tolist() for name, values in scores.items()}
    for name, head in (("previous_token", previous), ("first_token", first), ("entropy", uniform)):
        assert table[name][head] == pytest.approx(1, abs=1e-6)
        assert max(value for other, value in enumerate(table[name]) if other != head) < 0.2
    assert table["induction"][induction] > 0.95  # a random token may occur twice in one half
    assert max(table["induction"][head] for head in (previous, first, uniform, itself)) < 0.1
    labels = [describe_head(scores, 0, head).rsplit(" ", 1)[0] for head in range(5)]
    assert labels == ["previous token", "first token", "induction", "broad", "this token"]


def test_induction_score_is_the_weight_after_the_previous_occurrence(model: Transformer) -> None:
    scores = head_scores(model, torch.tensor([[0, 1, 2, 3]]), seed=3)
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(8, (4, 6), generator=generator).repeat(1, 2)
    with torch.no_grad():
        weights = recorded_weights(model.eval(), ids_BT)
    for layer in range(3):
        for head in range(2):
            values = [float(weights[layer][b, head, t, t - 5]) for b in range(4) for t in range(6, 12)]
            assert float(scores["induction"][layer, head]) == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_head_scores_are_repeatable_and_without_side_effects(model: Transformer) -> None:
    ids_BT = torch.randint(8, (2, 12))
    state = torch.get_rng_state()
    once, again = head_scores(model, ids_BT), head_scores(model, ids_BT)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_without_scores_come_from_the_text() -> None:
    weights_LHTS = torch.zeros(1, 2, 5, 5)
    weights_LHTS[0, 0] = torch.eye(5).roll(-1, 1)
    weights_LHTS[0, 1, :, 0] = 1
    scores = AttentionMaps("", list("abcde"), [0] * 5, weights_LHTS, []).measured_scores
    assert [describe_head(scores, 0, head) for head in range(2)] == ["previous token 1.00", "first token 1.00"]
