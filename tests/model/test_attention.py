"""The attention block is the formula: against loops over positions, and against PyTorch's fused kernel."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minitf.attention import (
    QUERY_BLOCK,
    Attention,
    AttentionContext,
    AttentionRecord,
    KeyValueCache,
    gather,
    match,
    visible_keys,
    weigh,
)
from minitf.backends import substitute
from minitf.backends.sdpa import Sdpa, SdpaAttention
from minitf.model import Transformer
from minitf.rope import rotary_table, rotate

CPU = torch.device("cpu")
HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])


def causal_mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    visible_TS = visible_keys(num_queries, num_keys, CPU)
    return torch.zeros(visible_TS.shape, dtype=dtype).masked_fill_(~visible_TS, -math.inf)


def random_qkv(num_heads: int, num_kv_heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q_BHTK = torch.randn(2, num_heads, 7, 8, dtype=dtype)
    k_BHSK, v_BHSK = torch.randn(2, 2, num_kv_heads, 7, 8, dtype=dtype)
    return q_BHTK, k_BHSK, v_BHSK


def naive_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and mixtures, one number at a time."""
    B, H, T, K = q_BHTK.shape
    weights, mixed = torch.zeros(B, H, T, T, dtype=torch.float64), torch.zeros(B, H, T, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h * k_BHSK.shape[1] // H
            for t in range(T):
                powers = []
                for s in range(t + 1):
                    products = [float(q_BHTK[b, h, t, i]) * float(k_BHSK[b, g, s, i]) for i in range(K)]
                    powers.append(math.exp(sum(products) / math.sqrt(K)))
                for s in range(t + 1):
                    weights[b, h, t, s] = powers[s] / sum(powers)
                    mixed[b, h, t] += weights[b, h, t, s] * v_BHSK[b, g, s]
    return weights, mixed


def make_block(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype = torch.float32
) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(1)
    block = Attention(24, num_heads, num_kv_heads, 8, qk_norm=True)
    torch.nn.init.uniform_(block.q_norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(block.k_norm.weight, 0.5, 1.5)
    return block, torch.randn(2, 9, 24, dtype=dtype), rotary_table(8, 9, 10000.0).to(dtype)


@HEADS
def test_match_weigh_gather_are_the_formula(num_heads: int, num_kv_heads: int) -> None:
    q_BHTK, k_BHSK, v_BHSK = random_qkv(num_heads, num_kv_heads)
    weights_BHTS = weigh(match(q_BHTK, k_BHSK, causal_mask(7, 7, torch.float64)))
    expected_BHTS, mixed_BHTK = naive_attention(q_BHTK, k_BHSK, v_BHSK)
    torch.testing.assert_close(weights_BHTS, expected_BHTS, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gather(weights_BHTS, v_BHSK), mixed_BHTK, rtol=1e-12, atol=1e-12)


@HEADS
def test_the_last_queries_of_a_longer_text_see_what_they_see_in_the_whole(num_heads: int, num_kv_heads: int) -> None:
    q_BHTK, k_BHSK, v_BHSK = random_qkv(num_heads, num_kv_heads)
    _, mixed_BHTK = naive_attention(q_BHTK, k_BHSK, v_BHSK)
    scores = match(q_BHTK[:, :, 4:], k_BHSK, causal_mask(3, 7, torch.float64))
    torch.testing.assert_close(gather(weigh(scores), v_BHSK), mixed_BHTK[:, :, 4:], rtol=1e-12, atol=1e-12)


@HEADS
@pytest.mark.parametrize("num_before", [0, 37])
def test_attention_in_blocks_of_queries_is_attention(num_heads: int, num_kv_heads: int, num_before: int) -> None:
    torch.manual_seed(0)
    T, S = 2 * QUERY_BLOCK + 5, 2 * QUERY_BLOCK + 5 + num_before
    q_BHTK = torch.randn(2, num_heads, T, 8, dtype=torch.float64)
    k_BHSK, v_BHSK = torch.randn(2, 2, num_kv_heads, S, 8, dtype=torch.float64)
    expected_BHTK = gather(weigh(match(q_BHTK, k_BHSK, causal_mask(T, S, torch.float64))), v_BHSK)
    cache = KeyValueCache(k_BHSK[None], v_BHSK[None], num_before)
    context = AttentionContext(rotary_table(8, S, 10000.0)[:, num_before:], torch.float64, cache=cache)
    mixed_BHTK = Attention(24, num_heads, num_kv_heads, 8, qk_norm=True).attend(q_BHTK, k_BHSK, v_BHSK, context, 0)
    torch.testing.assert_close(mixed_BHTK, expected_BHTK, rtol=1e-12, atol=1e-12)


@HEADS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_explicit_path_and_the_fused_kernel_agree(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    block, x_BTD, rotary_2TK = make_block(num_heads, num_kv_heads, dtype)
    explicit = block(x_BTD, AttentionContext(rotary_2TK, dtype))
    substitute(block, SdpaAttention)
    fused = block(x_BTD, AttentionContext(rotary_2TK, dtype))
    assert explicit.dtype == fused.dtype == dtype
    assert explicit.float().abs().mean() > 0.05
    torch.testing.assert_close(explicit, fused, rtol=tolerance, atol=tolerance)


@HEADS
def test_captured_weights_are_those_that_made_the_output(num_heads: int, num_kv_heads: int) -> None:
    block, x_BTD, rotary_2TK = make_block(num_heads, num_kv_heads)
    record: list[AttentionRecord] = []
    output_BTD = block(x_BTD, AttentionContext(rotary_2TK, torch.float32, record=record))
    (layer,) = record
    weights_BHTS = layer.weights_BHTS

    # The same tensor trains: without capture not a bit changes, and its gradient reaches the queries.
    assert torch.equal(output_BTD, block(x_BTD, AttentionContext(rotary_2TK, torch.float32)))
    (gradient,) = torch.autograd.grad(weights_BHTS[..., 0].sum(), block.q_proj.weight, retain_graph=True)
    assert gradient.abs().sum() > 0

    values_BHSK = (x_BTD @ block.v_proj.weight.T).view(2, 9, num_kv_heads, 8).transpose(1, 2)
    again = gather(weights_BHTS, values_BHSK).transpose(1, 2).reshape(2, 9, -1) @ block.o_proj.weight.T
    torch.testing.assert_close(output_BTD, again, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.v_BHSK, values_BHSK)
    torch.testing.assert_close(layer.mixed_BHTK, gather(weights_BHTS, values_BHSK))
    scores_BHTS = match(layer.q_BHTK, layer.k_BHSK, causal_mask(9, 9, torch.float32))
    torch.testing.assert_close(weigh(scores_BHTS), weights_BHTS)

    torch.testing.assert_close(weights_BHTS.sum(-1), torch.ones(2, num_heads, 9))
    assert weights_BHTS.min() >= 0
    assert not weights_BHTS.triu(1).any()
    assert weights_BHTS.shape == (2, num_heads, 9, 9)


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
def test_a_model_computes_the_same_with_and_without_capture(
    make_model: Callable[..., Transformer], attention: str
) -> None:
    model = make_model(attention=attention)
    if attention == "sdpa":
        Sdpa().install(model)
    ids_BT = torch.randint(50, (2, 20))
    record: list[AttentionRecord] = []
    seen = model(ids_BT, record=record)
    assert [tuple(layer.weights_BHTS.shape) for layer in record] == [(2, 4, 20, 20)] * 2
    if attention == "explicit":
        assert torch.equal(seen, model(ids_BT))
    torch.testing.assert_close(seen, model(ids_BT), rtol=1e-4, atol=1e-4)


def test_products_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    torch.manual_seed(0)
    table = rotary_table(16, 100, 10000.0).double()
    q_K, k_K = torch.randn(2, 16, dtype=torch.float64)
    q_TK, k_SK = rotate(q_K.expand(1, 1, 100, 16), table)[0, 0], rotate(k_K.expand(1, 1, 100, 16), table)[0, 0]
    products_TS = q_TK @ k_SK.T
    for distance in (0, 1, 5, 50):
        diagonal = products_TS.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-4)
    assert (products_TS[:, 0] - products_TS[0, 0]).abs().max() > 1  # and they do depend on it


def test_rotation_keeps_lengths_and_leaves_position_0_alone() -> None:
    x_BHTK = torch.randn(2, 3, 40, 16)
    rotated = rotate(x_BHTK, rotary_table(16, 40, 10000.0))
    torch.testing.assert_close(rotated.norm(dim=-1), x_BHTK.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x_BHTK[:, :, 0])


def test_rotation_turns_each_pair_by_its_own_angle() -> None:
    theta, position, K = 1000.0, 13, 8
    x_K = torch.randn(K, dtype=torch.float64)
    rotated = rotate(x_K.expand(1, 1, 20, K), rotary_table(K, 20, theta).double())[0, 0, position]
    for i in range(K // 2):
        angle = position * theta ** (-2 * i / K)
        turned = complex(x_K[i], x_K[i + K // 2]) * complex(math.cos(angle), math.sin(angle))
        assert complex(rotated[i], rotated[i + K // 2]) == pytest.approx(turned, abs=1e-5)


@HEADS
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_causal(num_heads: int, num_kv_heads: int, fused: bool) -> None:
    block, x_BTD, rotary_2TK = make_block(num_heads, num_kv_heads)
    if fused:
        substitute(block, SdpaAttention)
    context = AttentionContext(rotary_2TK, torch.float32)
    before = block(x_BTD, context)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 5:] = torch.randn(2, 4, 24) * 10
    after = block(changed_BTD, context)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[:, 5], before[:, 5], atol=0.1)
