"""Edits of attention: words and their tokens; what block, move and transplant change, and that nothing else does."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import make_text
from torch import Tensor

from minitf import edits
from minitf.backends.cpu.kernels import CpuKernels
from minitf.data.tokenizer_training import train_tokenizer
from minitf.edits import Head, Relation, Words, combined, forbid
from minitf.errors import RequestError
from minitf.interpretability.interventions import Reader, watch
from minitf.model import Transformer
from minitf.rope import rotate
from minitf.tokenizer import TokenizerConfig

TEXT = "The cat sat on the mat because it was tired"


def words_of(text: str) -> Words:
    """The words of a text, each of which is a token with the space before it."""
    ends = [index for index, character in enumerate(text) if character == " "] + [len(text)]
    return Words(text, list(pairwise([0, *ends])))


@pytest.fixture(scope="module")
def reader(make_model: Callable[..., Transformer]) -> Reader:
    """A random model, by bytes: a word has as many tokens as letters."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [make_text(10)])
    return Reader(make_model(tokenizer.vocab_size, context_length=64), tokenizer)


@torch.no_grad()
def read_without(model: Transformer, ids_BT: Tensor, looks_TS: Tensor, heads: set[Head]) -> Tensor:
    """Probabilities_BTV of a forward pass written out, in which some heads do not see some keys."""
    (B, T), K = ids_BT.shape, model.config.head_dim
    past_TS = torch.ones(T, T, dtype=torch.bool).tril()
    x_BTD = model.model.embed_tokens(ids_BT)
    for layer, block in enumerate(model.model.layers):
        attention, normed = block.self_attn, block.input_layernorm(x_BTD)
        q_BHTK = attention.q_norm(attention.q_proj(normed).view(B, T, -1, K)).transpose(1, 2)
        k_BGSK = attention.k_norm(attention.k_proj(normed).view(B, T, -1, K)).transpose(1, 2)
        v_BGSK = attention.v_proj(normed).view(B, T, -1, K).transpose(1, 2)
        q_BHTK, k_BGSK = rotate(q_BHTK, model.rotary[:, :T]), rotate(k_BGSK, model.rotary[:, :T])
        outputs = []
        for head in range(q_BHTK.shape[1]):
            shared = head // (q_BHTK.shape[1] // k_BGSK.shape[1])
            seen_TS = past_TS & ~looks_TS if (layer, head) in heads else past_TS
            scores_BTS = q_BHTK[:, head] @ k_BGSK[:, shared].mT / K**0.5
            outputs.append(scores_BTS.masked_fill(~seen_TS, -torch.inf).softmax(-1) @ v_BGSK[:, shared])
        x_BTD = x_BTD + attention.o_proj(torch.cat(outputs, -1))
        x_BTD = x_BTD + block.mlp(block.post_attention_layernorm(x_BTD))
    return (model.model.norm(x_BTD) @ model.vocabulary_VD.T).softmax(-1)


def test_a_word_is_its_last_occurrence_or_the_one_of_a_number() -> None:
    words = words_of("it is what it is and It can't")
    assert words.positions("it") == [3]
    assert words.positions("it:1") == [0]
    assert words.positions("it:2") == [3]
    assert words.positions("It") == [6]
    assert words.positions("IS") == [4]  # in another case, where the text has no such word
    assert words.positions(2) == words.positions("2") == [2]
    assert words.positions("what it") == [2, 3]
    assert words.occurrences("can") == [[7]]
    assert words.occurrences("an") == []  # inside a word


def test_a_name_with_a_colon_or_a_digit_is_found_as_written() -> None:
    assert words_of("at 3:16 he said 3").positions("3") == [4]
    assert words_of("at 7 he came").positions("7") == [1]


def test_words_in_chinese_need_no_spaces() -> None:
    words = Words("猫追后。它喵。", [(at, at + 1) for at in range(7)])
    assert words.positions("它") == [4]
    assert words.positions("追后") == [1, 2]
    assert words.positions("。") == [6]
    assert words.positions("。:1") == [3]


def test_a_word_of_several_tokens_has_all_of_them(reader: Reader) -> None:
    record = reader.reading(TEXT)
    assert record.words.positions("cat") == [4, 5, 6]
    watched = watch(reader, Relation(TEXT, "it", "cat"))
    at = TEXT.index("it ") + 1  # the last token of the query
    for layer, attention in enumerate(record.record):
        torch.testing.assert_close(watched.weight_LH[layer], attention.weights_BHTS[0, :, at, 4:7].sum(-1))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("heads", [None, {(0, 1)}, {(0, 0), (1, 3)}])
def test_block_equals_a_knockout_written_by_hand(
    make_model: Callable[..., Transformer], kernels: bool, heads: set[Head] | None
) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [make_text(10)])
    model = make_model(tokenizer.vocab_size, context_length=64)
    if kernels and (reason := CpuKernels().unsupported(model)):
        pytest.skip(reason)
    if kernels:
        CpuKernels().install(model, None)
    reader = Reader(model, tokenizer)
    looks_TS = torch.zeros(len(TEXT), len(TEXT), dtype=torch.bool)
    at = TEXT.index("it was")
    looks_TS[at : at + 2, 4:7] = True
    every = {(layer, head) for layer in range(2) for head in range(4)}
    found_TV, _ = reader.read(TEXT, reader.place(TEXT, [edits.block("it", "cat", heads)]))
    expected_BTV = read_without(model, reader.ids(TEXT), looks_TS, every if heads is None else heads)
    torch.testing.assert_close(found_TV, expected_BTV[0], rtol=0, atol=1e-6)
    plain_TV, _ = reader.read(TEXT)
    assert torch.equal(found_TV[:at], plain_TV[:at])
    assert not torch.allclose(found_TV[at], plain_TV[at], atol=1e-5)


@torch.no_grad()
def test_texts_packed_into_a_row_are_edited_as_each_alone(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    one_BT, other_BT = torch.randint(50, (1, 7)), torch.randint(50, (1, 9))
    looks_BTS = torch.zeros(1, 7, 7, dtype=torch.bool)
    looks_BTS[0, 5, 2] = True
    packed_BTS = torch.zeros(1, 16, 16, dtype=torch.bool)
    packed_BTS[0, 9 + 5, 9 + 2] = True
    segments_BT = torch.tensor([[1] * 9 + [2] * 7])
    packed_BTV = model(
        torch.cat([other_BT, one_BT], 1), segments_BT=segments_BT, edits=combined([forbid(packed_BTS, [(0, 1)])])
    )
    alone_BTV = model(one_BT, edits=combined([forbid(looks_BTS, [(0, 1)])]))
    torch.testing.assert_close(packed_BTV[:, 9:], alone_BTV, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_BTV[:, :9], model(other_BT), rtol=1e-4, atol=1e-5)


def test_move_exchanges_the_weights_of_two_words(reader: Reader) -> None:
    at, cat, mat = TEXT.index("it ") + 1, [4, 5, 6], [19, 20, 21]
    _, plain = reader.read(TEXT)
    _, moved = reader.read(TEXT, reader.place(TEXT, [edits.move("it", "cat", "mat", [(0, 2)])]))
    before_HS, after_HS = plain[0].weights_BHTS[0, :, at], moved[0].weights_BHTS[0, :, at]
    assert after_HS[2, cat].sum() == pytest.approx(float(before_HS[2, mat].sum()))
    assert after_HS[2, mat].sum() == pytest.approx(float(before_HS[2, cat].sum()))
    ratio = before_HS[2, cat] / before_HS[2, cat].sum()
    torch.testing.assert_close(after_HS[2, cat] / after_HS[2, cat].sum(), ratio)  # the proportions of its letters
    torch.testing.assert_close(after_HS.sum(-1), torch.ones(4))
    rest = [key for key in range(len(TEXT)) if key not in cat + mat]
    assert torch.equal(after_HS[2, rest], before_HS[2, rest])
    assert torch.equal(after_HS[[0, 1, 3]], before_HS[[0, 1, 3]])
    assert torch.equal(moved[0].weights_BHTS[0, :, : at - 1], plain[0].weights_BHTS[0, :, : at - 1])


def test_transplant_puts_what_another_text_gathered_in_place(reader: Reader) -> None:
    other = "A dog came because it was tired"
    at, source = TEXT.index("it ") + 1, other.index("it ") + 1
    mixed_HK = reader.read(other)[1][1].mixed_BHTK[0, :, source]
    place = reader.place(TEXT, [edits.transplant("it", other, heads=[(1, 0), (1, 3)])])
    _, changed = reader.read(TEXT, place)
    _, plain = reader.read(TEXT)
    assert torch.equal(changed[1].mixed_BHTK[0, [0, 3], at], mixed_HK[[0, 3]])
    assert torch.equal(changed[1].mixed_BHTK[0, [1, 2]], plain[1].mixed_BHTK[0, [1, 2]])
    assert torch.equal(changed[1].mixed_BHTK[0, :, :at], plain[1].mixed_BHTK[0, :, :at])


def test_edits_apply_in_their_order(reader: Reader) -> None:
    at = TEXT.index("it ") + 1
    both = [edits.move("it", "cat", "mat"), edits.move("it", "cat", "sat")]
    weights = [
        reader.read(TEXT, reader.place(TEXT, order))[1][0].weights_BHTS[0, 0, at] for order in (both, both[::-1])
    ]
    assert not torch.allclose(weights[0], weights[1])


def test_an_edit_is_immutable_and_the_same_again() -> None:
    edit = edits.block("it", "cat", [(1, 0), (0, 1)])
    assert edit == edits.block("it", "cat", [(0, 1), (1, 0)])
    assert len({edit, edits.block("it", "mat")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.query = "he"  # type: ignore[misc]


def test_a_reading_with_edits_leaves_the_model_as_it_was(reader: Reader) -> None:
    before = {name: value.clone() for name, value in reader.model.state_dict().items()}
    plain = reader.predict(TEXT)
    assert reader.predict(TEXT, [edits.block("it", "cat")]) == reader.predict(TEXT, [edits.block("it", "cat")])
    assert reader.predict(TEXT) == plain
    assert all(torch.equal(value, before[name]) for name, value in reader.model.state_dict().items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edits.block("it", "dog"), "it has no 'dog'"),
        (edits.block("it:2", "cat"), "it has 'it' 1 times"),
        (edits.block("it", "tired"), "'it' cannot look at 'tired', which comes later"),
        (edits.block("The:1", "The:1"), "nothing left to look at"),
        (edits.block(99, "cat"), "position 99 is not in the text: it has tokens 0 to 42"),
        (edits.block("it", "cat", [(0, 4)]), "there is no layer 0, head 4: the model has 2 layers of 4 heads"),
        (edits.block("it", ""), "it has no ''"),
        (edits.move("it", "cat", "cat"), "are the same word"),
        (edits.move("cat", "The:1", "mat"), "'cat' cannot look at 'mat', which comes later"),
        (edits.transplant("it", "A dog came"), "it has no 'it'"),
        (edits.transplant("it", ""), "the text has 0 tokens"),
    ],
)
def test_a_wrong_edit_is_one_clear_error(reader: Reader, edit: edits.Edit, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        reader.predict(TEXT, [edit])


def test_a_relation_is_the_text_and_then_the_look() -> None:
    relation = Relation.parse("a > b | so it said | it:1>cat")
    assert relation == ("a > b | so it said", "it:1", "cat")
    assert relation.name == "it:1>cat"
    for wrong in ("it>cat", "text | it", "text | >cat", " | it>cat", ""):
        with pytest.raises(RequestError, match="is no relation"):
            Relation.parse(wrong)


def test_watching_measures_the_token_that_follows(reader: Reader) -> None:
    watched = watch(reader, Relation(TEXT, "it", "cat"))
    plain_TV, _ = reader.read(TEXT)
    blocked_TV, _ = reader.read(TEXT, reader.place(TEXT, [edits.block("it", "cat")]))
    at, space = TEXT.index("it ") + 1, reader.tokenizer.encode(" ")[0]
    assert watched.next_token == " "
    assert watched.probability == float(plain_TV[at, space])
    assert watched.blocked == float(blocked_TV[at, space])
    at_the_end = watch(reader, Relation(TEXT[: at + 1], "it", "cat"))
    assert at_the_end.probability == float(plain_TV[at].max())
