"""The model and the tokenizer in the page compute what Python's do, from the same weights in bfloat16."""

import base64
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from helpers import NASTY, make_text, needs_node, run_node
from torch import Tensor

from minitf.attention import Edits
from minitf.data.tokenizer_training import train_tokenizer
from minitf.edits import combined, exchange, forbid, mask_of, without
from minitf.generate import GenerationRequest, generate
from minitf.inference.sampling import Sampling
from minitf.interpretability.attention_maps import AttentionMaps, attention_maps_of_ids
from minitf.interpretability.heads import head_scores, heads_off
from minitf.interpretability.page_model import MAX_BYTES, page_model, page_tokenizer
from minitf.interpretability.patching import TextPair
from minitf.interpretability.residual import contributions_of_ids, lens_of_ids
from minitf.interpretability.token_labels import join_bytes
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig
from minitf.variants import silenced

TEXT = "The old man sat on the mat, it was tired."
# Models of every shape that the page computes.
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 4, "qk_norm": False, "tie_embeddings": False},
    {"num_kv_heads": 1, "head_dim": 6, "intermediate_size": 50, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
    {"heads_off": [[1, 2], [0, 0]]},
    {"num_layers": 1, "hidden_size": 36, "num_heads": 3, "num_kv_heads": 3, "tie_embeddings": False},
]
ASK = """
import { createLaboratory } from "./laboratory.js";
import { readFileSync } from "node:fs";
const { model, usual, requests } = JSON.parse(readFileSync("requests.json"));
const laboratory = createLaboratory(model, usual);
const plain = (_, value) => (value instanceof Float32Array ? [...value] : value);
const replies = [];
for (const request of requests)
  replies.push(await laboratory.live(request).catch((error) => ({ error: error.code ?? error.message })));
console.log(JSON.stringify(replies, plain));
"""


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=300), [make_text(600)])


def rounded(make_model: Callable[..., Transformer], vocab_size: int, **shape: Any) -> Transformer:
    """A random model whose weights are those of bfloat16, as a page holds them, and zero where heads are off."""
    model = make_model(vocab_size, **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(silenced(name, parameter, model.config).bfloat16().float())
    return model


def ask(tmp_path: Path, model: dict[str, Any], requests: Sequence[dict[str, Any]], usual: Any = None) -> Any:
    content = {"model": model, "usual": usual or {}, "requests": requests}
    (tmp_path / "requests.json").write_text(json.dumps(content), encoding="utf-8")
    return run_node(ASK, tmp_path)


def assert_same(reply: dict[str, Any], maps: AttentionMaps) -> None:
    """All numbers of the page's reply are those of Python's to 1e-3."""
    expected = maps.to_viewer(exact=True)
    assert "error" not in reply, reply
    exact = ("tokens", "layers", "heads", "kv_heads", "head_dim", "encoding", "formula", "rows_sum_to_one", "alignment")
    assert {name: reply[name] for name in exact} == {name: expected[name] for name in exact}
    for name in ("weights", "value_norms", "output_norms"):
        assert_close(reply[name], decoded(expected[name]))
    for name in ("q", "k", "v"):
        assert_close(reply["vectors"][name]["values"], decoded(expected["vectors"][name]["values"]))
    assert_close(reply["actual"], expected["actual"])
    for ours, theirs in zip(reply["next_tokens"], expected["next_tokens"], strict=True):
        assert_close([p for _, p in ours], [p for _, p in theirs])
        assert ours[0][0] == theirs[0][0] or abs(ours[0][1] - ours[1][1]) < 1e-3
    for name, values in expected["scores"].items():
        assert_close(reply["scores"][name], values, 2e-3)
    for kind in ("labels", "here"):
        if expected[kind] is not None:  # not measured
            assert names_of(reply[kind]) == names_of(expected[kind])


def decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.as_tensor(theirs), rtol=1e-3, atol=tolerance)


def names_of(labels: list[list[Any]]) -> list[list[str | None]]:
    return [[label and label[0] for label in row] for row in labels]


@needs_node
@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_computes_the_maps_of_the_model(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer, shape: dict[str, Any]
) -> None:
    model = rounded(make_model, words.vocab_size, **shape)
    ids = words.encode(TEXT)
    scores = head_scores(model, torch.tensor([ids]))
    maps = attention_maps_of_ids(model, words, ids, TEXT, 7, 10, scores)
    usual = {name: scores[name].tolist() for name in ("induction", "same_word")}
    (reply,) = ask(tmp_path, page_model(model, words, 7, [TEXT]), [{"text": TEXT}], usual)
    assert_same(reply, maps)
    assert (reply["step"], reply["prompt_length"], reply["full"]) == (7, len(ids), TEXT)
    assert "before" not in reply


def positions(*chosen: int, size: int) -> Tensor:
    return mask_of(chosen, size)[None]


def cases(size: int) -> list[tuple[list[dict[str, Any]], Edits]]:
    """Edits as data, and the same for Python's model."""
    last, heads = size - 1, [[0, 1], [1, 0]]
    looks_BTS = positions(last, size=size)[..., None] & positions(2, 3, size=size)[:, None]
    block = {"kind": "block", "query": last, "keys": [2, 3], "heads": None}
    move = {"kind": "move", "query": last, "keys": [2, 3], "to": [5], "heads": heads}
    head = {"kind": "ablate", "heads": [[0, 2]], "by": "zero"}
    mlp = {"kind": "ablate", "mlp": 0, "by": "zero"}
    chosen = [(0, 1), (1, 0)]
    moved = exchange(positions(last, size=size), positions(2, 3, size=size), positions(5, size=size), chosen)
    blocked = forbid(looks_BTS)
    return [
        ([block], combined([blocked])),
        ([block | {"heads": heads}], combined([forbid(looks_BTS, chosen)])),
        ([move], combined([moved])),
        ([block, move], combined([blocked, moved])),  # the keys have no weight to share in proportion
        ([head], combined([without([(0, 2)])])),
        ([head | {"by": "mean"}], combined([without([(0, 2)], by="mean")])),
        ([mlp], combined([without(None, 0)])),
        ([mlp | {"by": "mean"}], combined([without(None, 0, "mean")])),
        ([mlp, head, block], combined([without(None, 0), without([(0, 2)]), blocked])),
    ]


@needs_node
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_page_applies_edits_as_the_model_does(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer, shape: dict[str, Any]
) -> None:
    model = rounded(make_model, words.vocab_size, **shape)
    ids = words.encode(TEXT)
    wanted = cases(len(ids))
    whole = attention_maps_of_ids(model, words, ids, TEXT, top_k=10)
    requests = [{"text": TEXT, "edits": edits} for edits, _ in wanted]
    off = {"text": TEXT, "heads_off": [[1, 3], [0, 0]]}
    replies = ask(tmp_path, page_model(model, words, 7, [TEXT]), [*requests, off])
    for reply, (_, edits) in zip(replies, wanted, strict=False):
        edited = attention_maps_of_ids(model, words, ids, TEXT, top_k=10, edits=edits)
        assert_same(reply, edited)
        assert max(abs(a - b) for a, b in zip(reply["actual"], whole.actual or [], strict=True)) > 1e-3 or (
            reply["next_tokens"][-1] != reply["before"]["next_tokens"][-1]
        )
        torch.testing.assert_close(reply["before"]["actual"], whole.actual, rtol=1e-3, atol=1e-3)
    with heads_off(model, [(1, 3), (0, 0)]):
        assert_same(replies[-1], attention_maps_of_ids(model, words, ids, TEXT, top_k=10))


@needs_node
def test_the_page_continues_a_text_as_the_model_does(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer
) -> None:
    model = rounded(make_model, words.vocab_size)
    texts = ["The", "The cat sat", ""]
    requests = [{"text": text, "new_tokens": 9, "temperature": 0} for text in texts]
    sampled = {"text": "The cat", "new_tokens": 12, "temperature": 1.0}
    replies = ask(tmp_path, page_model(model, words, 7, texts), [*requests, sampled, sampled, sampled | {"seed": 1}])
    for text, reply in zip(texts, replies, strict=False):
        prompt = words.encode(text) or [words.end_id]
        steps = generate(model, GenerationRequest(prompt, Sampling(temperature=0)))
        ids = prompt + [int(next(steps).ids_B[0]) for _ in range(9)]
        assert reply["full"] == words.decode(ids)
        assert_same(reply, attention_maps_of_ids(model, words, ids, text, top_k=10))
    assert replies[3] == replies[4]
    assert replies[3]["full"] != replies[5]["full"]


@needs_node
def test_the_page_draws_tokens_by_their_probability(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer
) -> None:
    model = rounded(make_model, words.vocab_size)
    requests = [{"text": "The", "new_tokens": 1, "temperature": 0.7, "seed": seed} for seed in range(400)]
    replies = ask(tmp_path, page_model(model, words, 7, []), requests)
    with torch.no_grad():
        p_V = (model(torch.tensor([words.encode("The")]))[0, -1] / 0.7).softmax(-1)
    drawn = [reply["tokens"][-1] for reply in replies]
    for label, p in zip(words.pieces(p_V.topk(3).indices.tolist()), p_V.topk(3).values.tolist(), strict=True):
        assert abs(drawn.count(label) / 400 - p) < 4 * (p * (1 - p) / 400) ** 0.5 + 1e-9


@needs_node
def test_the_page_refuses_what_the_model_cannot_do(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer
) -> None:
    def ablate(**what: Any) -> dict[str, Any]:
        return {"text": TEXT, "edits": [{"kind": "ablate", "by": "zero"} | what]}

    def look(kind: str, query: int, keys: list[int], **more: Any) -> dict[str, Any]:
        return {"text": TEXT, "edits": [{"kind": kind, "query": query, "keys": keys, "heads": None} | more]}

    refused = [
        ("too_long", {"text": "cat " * 40}), ("too_long", {"text": "The cat", "new_tokens": 31}),
        ("too_many_characters", {"text": "a" * 20_001}), ("surrogate", {"text": "a\ud800"}),
        ("no_head", {"text": TEXT, "heads_off": [[2, 0]]}), ("no_head", ablate(heads=[[0, 4]])),
        ("no_layer", ablate(mlp=5)), ("nothing_left", look("block", 1, [0, 1])),
        ("invalid", look("block", 1, [2])), ("invalid", look("move", 4, [1], to=[1, 2])),
        ("invalid", ablate(mlp=0, by="more")), ("no_position", {"text": "The cat", "kind": "lens", "position": 9}),
        ("no_token", {"text": "The cat", "kind": "contributions", "token": "no such token"}),
        ("pair_lengths", {"text": "The cat", "kind": "patch", "changed": "The", "layer": 0}),
        ("pair_alike", {"text": "The cat", "kind": "patch", "changed": "The cat", "layer": 0}),
    ]  # fmt: skip
    model = page_model(make_model(words.vocab_size), words, 7, [])
    replies = ask(tmp_path, model, [request for _, request in refused])
    for (code, request), reply in zip(refused, replies, strict=True):
        assert reply.get("error") == code, (request, str(reply)[:200])


# ---------------------------------------------------------------------------------------------------------------------
# Where predictions are made


def assert_same_tree(ours: Any, theirs: Any) -> None:
    """JSON values with the same texts, and numbers that differ by less than 1e-3."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_same_tree(ours[name], theirs[name])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_tree(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    else:
        assert ours == theirs


@needs_node
@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_computes_lens_and_contributions(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer, shape: dict[str, Any]
) -> None:
    model = rounded(make_model, words.vocab_size, **shape)
    ids = words.encode(TEXT)
    ids_1T, [label] = torch.tensor([ids]), words.pieces([70])
    data, edits = [{"kind": "ablate", "mlp": 0, "by": "zero"}], combined([without(None, 0)])
    asked = {"text": TEXT, "kind": "contributions"}
    replies = ask(
        tmp_path,
        page_model(model, words, 7, [TEXT]),
        [
            {"text": TEXT, "kind": "lens"},
            {"text": TEXT, "kind": "lens", "edits": data},
            asked,
            asked | {"position": 4},
            asked | {"position": 2, "token": label, "edits": data},
            asked | {"token": "no such token"},
        ],
    )
    assert_same_tree(replies[0], lens_of_ids(model, words, ids_1T).to_json())
    assert_same_tree(replies[1], lens_of_ids(model, words, ids_1T, edits).to_json())
    last = contributions_of_ids(model, words, ids_1T).to_json()
    assert_same_tree(replies[2], last | {"position": len(ids) - 1})
    assert_same_tree(replies[3], contributions_of_ids(model, words, ids_1T, ids[5], 4).to_json() | {"position": 4})
    changed = contributions_of_ids(model, words, ids_1T, 70, 2, edits).to_json()
    assert_same_tree(replies[4], changed | {"position": 2})
    for reply in replies[2:5]:
        assert sum(reply["parts"].values()) == pytest.approx(reply["logit"], abs=1e-3)
    assert replies[5]["error"] == "no_token"


@needs_node
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_page_patches_two_sentences(
    tmp_path: Path, make_model: Callable[..., Transformer], words: Tokenizer, shape: dict[str, Any]
) -> None:
    model = rounded(make_model, words.vocab_size, **shape)
    changed = TEXT.replace("sat", "sang")
    ids = [torch.tensor([words.encode(text)]) for text in (TEXT, changed)]
    assert ids[0].shape == ids[1].shape
    asked = {"text": TEXT, "kind": "patch", "changed": changed, "heads": False, "layer": 0}
    cases = [asked, asked | {"layer": 1}, asked | {"layer": 1, "heads": True}, asked | {"heads": True, "position": 6}]
    wrong = [asked | {"changed": "The"}, asked | {"changed": TEXT}, asked | {"layer": 2}]
    *replies, shorter, same, layer = ask(tmp_path, page_model(model, words, 7, [TEXT]), [*cases, *wrong])
    for case, reply in zip(cases, replies, strict=True):
        end = case.get("position", ids[0].shape[1] - 1) + 1
        pair = TextPair.of(model, words, *(one[:, :end] for one in ids), contrast=True)
        restores, breaks = (pair.heads if case["heads"] else pair.layer)(case["layer"])
        expected = pair.to_json() | {"position": end - 1, "layer": case["layer"], "heads": case["heads"]}
        assert_same_tree(reply, expected | {"restores": restores.tolist(), "breaks": breaks.tolist()})
    assert [reply["error"] for reply in (shorter, same, layer)] == ["pair_lengths", "pair_alike", "no_layer"]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

HARD = [
    *(text for text in NASTY if "\ud800" not in text),
    *("", " ", "  ", "a  b   c ", "\n\n a\t\r\n b\u00a0\u2003c\u0085d\u3000e\ufeff f\u200b", "x" * 70, "aaaaaaababab"),
    "don't I'll we've he'd they're I'm it's 'S can''t",
    "你好，世界！ 猫坐在垫子上。",
    "😀😀 👩‍👩‍👧 🇨🇳x",
    "naïve café e\u0301 ﬁ ½ ² Ⅷ ४२ ١٢",
    "<|endoftext|> </script> <!-- &amp;",
    "\x00\x1f\x7f\U0010ffff",
    "The cat sat on the mat. 3.14159, 10,000!!! ... ¿qué?",
    "_under_score__ a_b #$%^&*() ''' ``",
]
SCRIPTS = [(0x20, 0x7F), (0x09, 0x0E), (0xA0, 0x250), (0x370, 0x600), (0x2000, 0x2070), (0x4E00, 0x4E40)]
SPLIT = """
import { createTokenizer } from "./tokenizer.js";
import { readFileSync } from "node:fs";
const { tokenizer, texts } = JSON.parse(readFileSync("texts.json"));
const { encode, decode, labels } = createTokenizer(tokenizer);
console.log(JSON.stringify(texts.map((text) => {
  try {
    const ids = encode(text);
    return [ids, decode(ids), labels(ids), ids.map((_, i) => decode(ids.slice(i)))];
  } catch (error) {
    return error.code + JSON.stringify(error.values);
  }
})));
"""


def split(tmp_path: Path, tokenizer: Tokenizer, texts: Sequence[str], known: Sequence[str] = ()) -> list[Any]:
    content = {"tokenizer": page_tokenizer(tokenizer, tokenizer.vocab_size, known), "texts": texts}
    (tmp_path / "texts.json").write_text(json.dumps(content), encoding="utf-8")
    return run_node(SPLIT, tmp_path)  # type: ignore[no-any-return]


def some_texts() -> list[str]:
    """Texts of random characters of many scripts, and the hard ones."""
    choose = random.Random(0)
    chars = [chr(code) for low, high in SCRIPTS for code in range(low, high)]
    return [*HARD, make_text(3), *("".join(choose.choices(chars + [" "] * 300, k=40)) for _ in range(200))]


@needs_node
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_the_page_splits_text_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    texts = some_texts()
    words = "don't I'll we've he'd they're I'm it's 你好 你好 世界 世界 😀 😀 café café aaaaaaaa abababab   x \n\n y "
    sample = [make_text(300), "".join(texts), words * 20]
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=700 if kind == "bpe" else 0), sample)
    for text, (ids, whole, labels, ends) in zip(texts, split(tmp_path, tokenizer, texts), strict=True):
        expected = tokenizer.encode(text)
        assert ids == expected, text
        assert whole == text
        assert labels == join_bytes(tokenizer.pieces(expected))
        assert ends == [tokenizer.decode(expected[i:]) for i in range(len(expected))]


@needs_node
def test_the_page_splits_text_into_the_characters_of_an_alphabet(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["The cat 你好 😀é'\n", "<|endoftext|>"])
    texts = ["The cat", "你好😀 é'\n", "<|endoftext|>", "dog", "tea₂"]
    *known, dog, tea = split(tmp_path, tokenizer, texts)
    for text, (ids, whole, labels, _) in zip(texts, known, strict=False):
        assert ids == tokenizer.encode(text)
        assert whole == text
        assert labels == tokenizer.pieces(ids)
    assert dog[0] == tokenizer.encode("dog") if isinstance(dog, list) else dog == 'unknown_character{"character":"g"}'
    assert tea == 'unknown_character{"character":"₂"}'


@needs_node
def test_of_another_tokenizer_only_the_sentences_of_the_page_can_be_read(
    tmp_path: Path, make_model: Callable[..., Transformer]
) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend)
    _, other = split(tmp_path, tokenizer, ["the cat the", "cat cat"], ["the cat the"])
    assert other == "only_known{}"
    model = rounded(make_model, tokenizer.vocab_size)
    data = page_model(model, tokenizer, 7, ["the cat the"])
    assert data["tokenizer"]["kind"] == "none"
    read, written = ask(tmp_path, data, [{"text": "the cat the"}, {"text": "the cat the", "new_tokens": 1}])
    ids = tokenizer.encode("the cat the")
    assert_same(read, attention_maps_of_ids(model, tokenizer, ids, "the cat the", top_k=10))
    assert written["error"] == "only_known"


# ---------------------------------------------------------------------------------------------------------------------
# Which models


def test_only_small_standard_models_are_in_the_page(make_model: Callable[..., Transformer], words: Tokenizer) -> None:
    def why(**shape: Any) -> str | None:
        return page_model(make_model(words.vocab_size, **shape), words, 0, []).get("why")

    assert why() is None
    assert why(variant="sink") == "page_other"
    assert why(rope_scaling={"rope_type": "linear", "factor": 2.0}) == "page_other"
    assert why(hidden_size=512) == "page_large"
    assert page_model(make_model(words.vocab_size), words, 0, [], pairs=True)["why"] == "page_pairs"
    mixed = make_model(words.vocab_size)
    mixed.model.layers[1] = make_model(words.vocab_size, variant="sink").model.layers[1]  # type: ignore
    assert page_model(mixed, words, 0, [])["why"] == "page_other"


def test_heads_off_for_good_are_zeros_in_the_page(make_model: Callable[..., Transformer], words: Tokenizer) -> None:
    """In a run their columns may have moved, without any effect."""
    data = page_model(make_model(words.vocab_size, heads_off=[[0, 0]]), words, 0, [])
    weights = torch.frombuffer(bytearray(base64.b64decode(data["weights"])), dtype=torch.bfloat16).float()
    names, sizes = zip(*data["parameters"], strict=True)
    projection = weights.split(sizes)[names.index("model.layers.0.self_attn.o_proj.weight")].view(32, 32)
    assert (projection[:, :8] == 0).all()
    assert (projection[:, 8:] != 0).all()


def test_a_model_of_a_million_parameters_takes_less_than_3_mb(
    make_model: Callable[..., Transformer], words: Tokenizer
) -> None:
    nano = make_model(4096, num_layers=2, hidden_size=128, num_heads=4, num_kv_heads=4)
    assert nano.num_parameters() > 900_000
    assert len(page_model(nano, words, 0, [])["weights"]) < MAX_BYTES == 3_000_000
