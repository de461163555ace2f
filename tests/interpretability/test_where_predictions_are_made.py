"""The lens, contributions to a logit, activation patching, and what a token's removal costs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minitf import edits
from minitf.attention import gather
from minitf.edits import Edit
from minitf.errors import RequestError
from minitf.interpretability.explain import removal_probabilities
from minitf.interpretability.interventions import Reader
from minitf.interpretability.patching import patch
from minitf.interpretability.residual import contributions, lens, residual_of
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

MakeModel = Callable[..., Transformer]
TEXT = "The cat sat on the mat."


@pytest.fixture
def reader(make_model: MakeModel, tokenizer: Tokenizer) -> Reader:
    return Reader(make_model(tokenizer.vocab_size), tokenizer)


def logits_of(reader: Reader, text: str = TEXT) -> Tensor:
    with torch.no_grad():
        return reader.model(reader.ids(text))[0]


def test_the_last_row_of_the_lens_is_the_prediction(reader: Reader) -> None:
    found, probabilities_TV = lens(reader, TEXT), logits_of(reader).softmax(-1)
    assert found.names == ["embedding", *(f"layer {i} {part}" for i in range(2) for part in ("attention", "MLP"))]
    best = probabilities_TV.max(-1)
    assert [token for token, _ in found.best[-1]] == reader.tokenizer.pieces(best.indices.tolist())
    torch.testing.assert_close(torch.tensor([p for _, p in found.best[-1]]), best.values)
    following = reader.ids(TEXT)[0, 1:]
    expected = probabilities_TV[:-1].gather(1, following[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.actual[-1][:-1]), expected)
    assert all(row[-1] is None for row in found.actual)


def test_the_first_row_of_the_lens_knows_only_the_token_itself(reader: Reader) -> None:
    model = reader.model
    x_TD = model.model.embed_tokens(reader.ids(TEXT)[0])
    expected = model.logits(model.model.norm(x_TD)).argmax(-1)
    assert [token for token, _ in lens(reader, TEXT).best[0]] == reader.tokenizer.pieces(expected.tolist())


def test_contributions_add_up_to_the_logit(reader: Reader) -> None:
    for text in (TEXT, "The"):
        logits_V = logits_of(reader, text)[-1]
        found = contributions(reader, text)
        assert found.logit == pytest.approx(float(logits_V.max()), abs=1e-4)
        assert sum(found.parts.values()) == pytest.approx(found.logit, abs=1e-4)
        assert len(found.parts) == 1 + 2 * (reader.model.config.num_heads + 1)


def test_a_head_that_is_off_for_good_adds_nothing(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    found = contributions(Reader(make_model(tokenizer.vocab_size, heads_off=[[1, 2]]), tokenizer), TEXT)
    assert found.parts["layer 1 head 2"] == 0
    assert sum(found.parts.values()) == pytest.approx(found.logit, abs=1e-4)


def test_the_contribution_of_a_head_is_what_its_ablation_takes_from_the_sum(reader: Reader) -> None:
    """The last layer's heads write into the sum directly; the MLP after them is kept as it was."""
    model, text = reader.model, TEXT
    whole = residual_of(model, reader.ids(text))
    last = whole.streams[-1][-1]
    token = int(logits_of(reader)[-1].argmax())
    scale = (last.square().mean() + model.model.norm.eps).rsqrt()
    direction_D = model.model.norm.weight * model.vocabulary_VD[token] * scale
    _, record = reader.read(text, reader.place(text, [edits.ablate([(1, 2)])]))
    o_proj = model.model.layers[1].self_attn.o_proj
    before, after = (one.mixed_BHTK[0, :, -1].flatten() for one in (whole.record[1], record[1]))
    lost = float((o_proj(before) - o_proj(after)).detach() @ direction_D.detach())
    assert contributions(reader, text).parts["layer 1 head 2"] == pytest.approx(lost, abs=1e-5)


def test_a_token_is_named_with_or_without_its_space(reader: Reader) -> None:
    with pytest.raises(RequestError, match="is not one token"):
        contributions(reader, TEXT, "antidisestablishmentarianism")
    assert contributions(reader, TEXT, " cat") == contributions(reader, TEXT, "cat")


CLEAN, CHANGED = "The cat sat on the mat.", "The sat sat on the mat."


def test_patching_the_changed_word_into_the_first_layer_restores_everything(reader: Reader) -> None:
    found = patch(reader, CLEAN, CHANGED, "cat", "mat")
    differs = (reader.ids(CLEAN) != reader.ids(CHANGED))[0]
    assert differs.sum() == 1
    for shares_LT in (found.restores_LT, found.breaks_LT):
        assert shares_LT.shape == (2, len(found.clean_tokens))
        assert float(shares_LT[0, differs]) == pytest.approx(1, abs=1e-3)
        assert shares_LT[0, ~differs].abs().max() < 1e-3
    assert found.head_restores_LHT.shape == (2, 4, len(found.clean_tokens))


def test_patching_a_head_is_a_transplant(reader: Reader) -> None:
    found, last = patch(reader, CLEAN, CHANGED, "cat", "mat"), reader.ids(CLEAN).shape[1] - 1
    cat, mat = (reader.tokenizer.encode(word)[0] for word in (" cat", " mat"))
    edit = edits.transplant(last, CLEAN, heads=[(1, 3)])
    difference = [float(torch.log(p[cat] / p[mat])) for p in (_last(reader, CHANGED, edit), _last(reader, CHANGED))]
    expected = (difference[0] - difference[1]) / found.difference
    assert float(found.head_restores_LHT[1, 3, last]) == pytest.approx(expected, abs=2e-3)


def _last(reader: Reader, text: str, *chosen: Edit) -> Tensor:
    return reader.read(text, reader.place(text, list(chosen)))[0][-1].double()


def test_texts_that_cannot_be_compared_are_refused(reader: Reader) -> None:
    with pytest.raises(RequestError, match="tokens: patching needs as many in both"):
        patch(reader, "The cat sat.", "The cat sat on the mat.")
    with pytest.raises(RequestError, match="both texts are the same"):
        patch(reader, TEXT, TEXT)


def test_removal_is_a_value_of_zero(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = reader.ids(TEXT)[0].tolist()
    whole_T, removed_ST = removal_probabilities(reader.model, ids)
    expected = logits_of(reader).softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(whole_T, expected)

    def gather_without_2(weights_BHTS: Tensor, v_BHSK: Tensor) -> Tensor:
        v_BHSK = v_BHSK.clone()
        v_BHSK[:, :, 2] = 0
        return gather(weights_BHTS, v_BHSK)

    monkeypatch.setattr("minitf.attention.gather", gather_without_2)
    by_hand = logits_of(reader).softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(removed_ST[2], by_hand)
    torch.testing.assert_close(removed_ST[2, :2], whole_T[:2])  # nothing before it can depend on it
    assert not torch.allclose(removed_ST[2, 2:], whole_T[2:])


@pytest.mark.parametrize("by", ["zero", "mean"])
def test_an_mlp_is_ablated(reader: Reader, by: str) -> None:
    mlp = reader.model.model.layers[1].mlp
    handle = mlp.register_forward_hook(
        lambda _, __, out: torch.zeros_like(out) if by == "zero" else out.mean((0, 1), keepdim=True).expand_as(out)
    )
    expected = logits_of(reader).softmax(-1)
    handle.remove()
    found, _ = reader.read(TEXT, reader.place(TEXT, [edits.ablate(mlp=1, by=by)]))
    torch.testing.assert_close(found, expected)
    assert not mlp._forward_hooks


def test_ablation_takes_heads_or_an_mlp(reader: Reader) -> None:
    for wrong in ({}, {"heads": [(0, 0)], "mlp": 0}, {"mlp": 0, "by": "median"}):
        with pytest.raises(RequestError, match="ablate takes"):
            edits.ablate(**wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="there is no layer 7"):
        reader.place(TEXT, [edits.ablate(mlp=7)])
    with pytest.raises(RequestError, match="there is no layer 0, head 9"):
        reader.place(TEXT, [edits.ablate([(0, 9)])])
