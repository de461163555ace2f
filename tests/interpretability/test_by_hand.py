"""Interventions against a forward pass written by hand, in float64: nothing of attention.py or model.py is called."""

from collections.abc import Callable

import pytest
import torch
from helpers import WordTokenizer
from torch import Tensor

from minitf import edits
from minitf.interpretability.residual import contributions_of_ids, residual_of
from minitf.model import Transformer

IDS = torch.tensor([[3, 1, 4, 1, 5, 0, 2, 6]])
QUERY, KEY, OTHER = 6, 2, 4
HEADS = [(0, 1), (1, 3)]
Change = Callable[[str, int, int, Tensor], Tensor]  # the step, layer and head, its result -> what to use


def nothing(step: str, layer: int, head: int, result: Tensor) -> Tensor:
    return result


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_hand(model: Transformer, ids: Tensor, change: Change = nothing) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The residual stream after the embedding and each half-layer, (T, D), and what each head of a layer gathers."""
    w, c, T = dict(model.named_parameters()), model.config, len(ids)
    half = c.head_dim // 2
    angles = torch.arange(T).double()[:, None] * c.rope_theta ** (-torch.arange(half).double() / half)

    def turned(x: Tensor) -> Tensor:
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    x = w["model.embed_tokens.weight"][ids]
    streams, gathered = [x], []
    for layer in range(c.num_layers):
        p = {name.split(f"layers.{layer}.")[1]: value for name, value in w.items() if f"layers.{layer}." in name}
        z, outputs = norm(x, p["input_layernorm.weight"]), []
        for head in range(c.num_heads):
            own, shared = (
                slice(h * c.head_dim, (h + 1) * c.head_dim) for h in (head, head * c.num_kv_heads // c.num_heads)
            )
            q = turned(norm(z @ p["self_attn.q_proj.weight"][own].T, p["self_attn.q_norm.weight"]))
            k = turned(norm(z @ p["self_attn.k_proj.weight"][shared].T, p["self_attn.k_norm.weight"]))
            v = z @ p["self_attn.v_proj.weight"][shared].T
            scores = (q @ k.T / c.head_dim**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            weights = change("weigh", layer, head, change("match", layer, head, scores).softmax(-1))
            outputs.append(change("gather", layer, head, weights @ v))
        x = x + torch.cat(outputs, -1) @ p["self_attn.o_proj.weight"].T
        z = norm(x, p["post_attention_layernorm.weight"])
        hidden = torch.nn.functional.silu(z @ p["mlp.gate_proj.weight"].T) * (z @ p["mlp.up_proj.weight"].T)
        streams += [x, x + change("mlp", layer, 0, hidden @ p["mlp.down_proj.weight"].T)]
        x = streams[-1]
        gathered.append(outputs)
    return streams, gathered


def logits(model: Transformer, streams: list[Tensor]) -> Tensor:
    w = dict(model.named_parameters())
    return norm(streams[-1], w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


@pytest.fixture
def model(make_model: Callable[..., Transformer]) -> Transformer:
    exact = make_model().double()
    exact.compute_dtype = torch.float64
    return exact


def computed(model: Transformer, *placed: edits.Placed) -> Tensor:
    """The model's logits in float64 (`forward` would round them to float32)."""
    edited = edits.combined(placed)
    with torch.no_grad(), edits.editing(model, edited):
        return model.hidden(IDS, edits=edited)[0] @ model.vocabulary_VD.T


def positions(*chosen: int) -> Tensor:
    return edits.mask_of(chosen, IDS.shape[1])[None]


def blocked(step: str, layer: int, head: int, result: Tensor) -> Tensor:
    if step == "match" and (layer, head) in HEADS:
        result = result.clone()
        result[QUERY, KEY] = -torch.inf
    return result


def moved(step: str, layer: int, head: int, result: Tensor) -> Tensor:
    if step == "weigh" and (layer, head) in HEADS:
        result = result.clone()
        result[QUERY, [KEY, OTHER]] = result[QUERY, [OTHER, KEY]]
    return result


def averaged(step: str, layer: int, head: int, result: Tensor) -> Tensor:
    return result.mean(0).expand_as(result) if step == "gather" and (layer, head) in HEADS else result


def without_mlp(step: str, layer: int, head: int, result: Tensor) -> Tensor:
    return result.mean(0).expand_as(result) if step == "mlp" and layer == 1 else result


LOOK = (positions(QUERY)[0][:, None] & positions(KEY)[0])[None]


@pytest.mark.parametrize(
    ("placed", "change"),
    [
        (None, nothing),
        (edits.forbid(LOOK, HEADS), blocked),
        (edits.exchange(positions(QUERY), positions(KEY), positions(OTHER), HEADS), moved),
        (edits.without(HEADS, by="mean"), averaged),
        (edits.without(None, mlp=1, by="mean"), without_mlp),
    ],
    ids=["unedited", "block", "move", "mean of heads", "mean of an MLP"],
)
def test_an_edit_equals_the_same_written_by_hand(
    model: Transformer, placed: edits.Placed | None, change: Change
) -> None:
    expected = logits(model, by_hand(model, IDS[0], change)[0])
    torch.testing.assert_close(computed(model, *([placed] if placed else [])), expected, rtol=1e-6, atol=1e-6)
    if placed is not None:
        assert not torch.allclose(expected, logits(model, by_hand(model, IDS[0])[0]), atol=1e-3)


def test_a_patch_equals_the_same_written_by_hand(model: Transformer) -> None:
    twin = IDS[0].clone()
    twin[KEY] = 7
    _, gathered = by_hand(model, twin)

    def patched(step: str, layer: int, head: int, result: Tensor) -> Tensor:
        if step == "gather" and (layer, head) in HEADS:
            result = result.clone()
            result[QUERY] = gathered[layer][head][QUERY]
        return result

    mixed_LBHK = torch.stack([torch.stack([head[QUERY] for head in layer])[None] for layer in gathered])
    found = computed(model, edits.replace_gathered(positions(QUERY), mixed_LBHK, HEADS))
    expected = logits(model, by_hand(model, IDS[0], patched)[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_lens_and_contributions_equal_the_same_written_by_hand(make_model: Callable[..., Transformer]) -> None:
    """Both compute in float32."""
    model, exact = make_model(vocab_size=8), make_model(vocab_size=8).double()
    streams, gathered = by_hand(exact, IDS[0])
    for found, expected in zip(residual_of(model, IDS).streams, streams, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found_parts = contributions_of_ids(model, WordTokenizer(), IDS, 5)  # type: ignore[arg-type]
    w = dict(exact.named_parameters())
    last = streams[-1][-1]
    direction = w["model.norm.weight"] * w["model.embed_tokens.weight"][5] / (last.pow(2).mean() + 1e-6).sqrt()
    K = exact.config.head_dim
    parts = {"embedding": streams[0][-1] @ direction}
    for layer, heads in enumerate(gathered):
        output = w[f"model.layers.{layer}.self_attn.o_proj.weight"]
        for head, mixed in enumerate(heads):
            parts[f"layer {layer} head {head}"] = output[:, head * K : (head + 1) * K] @ mixed[-1] @ direction
        parts[f"layer {layer} MLP"] = (streams[2 * layer + 2] - streams[2 * layer + 1])[-1] @ direction
    assert found_parts.parts == pytest.approx({name: float(value) for name, value in parts.items()}, abs=1e-5)
    assert found_parts.logit == pytest.approx(float(logits(exact, streams)[-1, 5]), abs=1e-5)
