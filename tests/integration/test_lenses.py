"""TransformerLens and nnsight on our checkpoints: the same logits and maps, and the same results of every intervention.

They come in an environment of their own (`.ci/run`): `pip install -e '.[lenses]'`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minitf
from minitf.api import LanguageModel
from minitf.edits import Edit, ablate, block, move

pytestmark = pytest.mark.neighbours
INSTALL = "install the extra minitf[lenses]"
TEXT, CHANGED = "The cat sat on the mat.", "The dog sat on the mat."
QUERY, KEY, OTHER_KEY, HEADS = 12, 5, 9, [(1, 0), (1, 2)]
HEADS_OF_LAYER_1 = [head for _, head in HEADS]
Hook = tuple[str, Callable[[Tensor, Any], Tensor]]


@pytest.fixture(scope="module")
def lm(trained_run: Path) -> LanguageModel:
    return minitf.load(trained_run, "cpu")


@pytest.fixture(scope="module")
def bridge(trained_run: Path) -> Any:
    models = pytest.importorskip("transformer_lens.model_bridge", reason=INSTALL)
    checkpoint = str(trained_run / "checkpoints/best")
    return models.TransformerBridge.boot_transformers(checkpoint, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module", name="ids_1T")
def _ids_of_the_text(lm: LanguageModel) -> Tensor:
    return torch.tensor([lm.tokenizer.start_ids + lm.tokenizer.encode(TEXT)])


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def changing(change: Callable[[Tensor], None]) -> Callable[[Tensor, Any], Tensor]:
    """A hook of TransformerLens that changes a copy of an activation in place."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        change(value)
        return value

    return hook


def test_transformer_lens_computes_the_same_logits_and_maps(lm: LanguageModel, bridge: Any, ids_1T: Tensor) -> None:
    logits, cache = bridge.run_with_cache(ids_1T)
    torch.testing.assert_close(logits, lm.model(ids_1T), atol=1e-4, rtol=0)
    for layer, weights_HTS in enumerate(lm.attention(TEXT).weights_LHTS):
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"][0], weights_HTS, atol=1e-5, rtol=0)


def test_nnsight_computes_the_same_logits(trained_run: Path, lm: LanguageModel, ids_1T: Tensor) -> None:
    nnsight = pytest.importorskip("nnsight", reason=INSTALL)
    checkpoint = str(trained_run / "checkpoints/best")
    model = nnsight.TransformersModel(
        checkpoint, task="text-generation", device_map="cpu", dtype=torch.float32, dispatch=True
    )
    with model.trace({"input_ids": ids_1T}):
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits, lm.model(ids_1T), atol=1e-4, rtol=0)


def _forbid(scores_BHTS: Tensor) -> None:
    scores_BHTS[:, HEADS_OF_LAYER_1, QUERY, KEY] = -torch.inf


def _exchange(weights_BHTS: Tensor) -> None:
    weights_BHTS[:, HEADS_OF_LAYER_1, QUERY, KEY], weights_BHTS[:, HEADS_OF_LAYER_1, QUERY, OTHER_KEY] = (
        weights_BHTS[:, HEADS_OF_LAYER_1, QUERY, OTHER_KEY].clone(),
        weights_BHTS[:, HEADS_OF_LAYER_1, QUERY, KEY].clone(),
    )


def _zero(mixed_BTHK: Tensor) -> None:
    mixed_BTHK[:, :, HEADS_OF_LAYER_1] = 0


def _mean(mixed_BTHK: Tensor) -> None:
    mixed_BTHK[:, :, HEADS_OF_LAYER_1] = mixed_BTHK[:, :, HEADS_OF_LAYER_1].mean((0, 1))


def _mean_of_all(output_BTD: Tensor) -> None:
    output_BTD[:] = output_BTD.mean((0, 1))


@pytest.mark.parametrize(
    ("edit", "place", "change"),
    [
        (block(QUERY, KEY, HEADS), "attn.hook_attn_scores", _forbid),
        (move(QUERY, KEY, OTHER_KEY, HEADS), "attn.hook_pattern", _exchange),
        (ablate(HEADS), "attn.hook_z", _zero),
        (ablate(HEADS, by="mean"), "attn.hook_z", _mean),
        (ablate(mlp=1, by="mean"), "hook_mlp_out", _mean_of_all),
    ],
    ids=["block", "move", "zero", "mean", "mean of the MLP"],
)
def test_an_edit_is_the_hook_of_transformer_lens(
    lm: LanguageModel, bridge: Any, ids_1T: Tensor, edit: Edit, place: str, change: Callable[[Tensor], None]
) -> None:
    # After the query's own token: in the last layer an edit of one query changes what is predicted there alone.
    read = TEXT[: QUERY + 1] if place in ("attn.hook_attn_scores", "attn.hook_pattern") else TEXT
    hooked = ids_1T[:, : len(read) + len(lm.tokenizer.start_ids)]
    assert hooked.shape[1] == len(lm.tokenizer.start_ids) + len(lm.tokenizer.encode(read))
    logits = bridge.run_with_hooks(hooked, fwd_hooks=[(f"blocks.1.{place}", changing(change))])
    theirs = logits[0, -1].softmax(-1).topk(20).values
    ours = torch.tensor([p for _, p in lm.predict(read, [edit], top_k=20)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    plain = torch.tensor([p for _, p in lm.predict(read, top_k=20)])
    assert (plain - ours).abs().max() > 1e-4


def test_the_lens_reads_the_same_residual_stream(lm: LanguageModel, bridge: Any, ids_1T: Tensor) -> None:
    _, cache = bridge.run_with_cache(ids_1T)
    places = ["blocks.0.hook_resid_pre"]
    places += [f"blocks.{layer}.{place}" for layer in range(2) for place in ("hook_resid_mid", "hook_resid_post")]
    found = lm.lens(TEXT)
    assert len(found.best) == len(places)
    for row, place in zip(found.best, places, strict=True):
        theirs = bridge.unembed(bridge.ln_final(cache[place]))[0].softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor([p for _, p in row]), theirs, atol=1e-5, rtol=0)


def test_contributions_are_direct_logit_attributions(lm: LanguageModel, bridge: Any, ids_1T: Tensor) -> None:
    logits, cache = bridge.run_with_cache(ids_1T)
    id_ = int(logits[0, -1].argmax())
    direction_D = lm.model.model.norm.weight * lm.model.vocabulary_VD[id_] / cache["ln_final.hook_scale"][0, -1]
    found = lm.contributions(TEXT).parts
    for layer in range(2):
        z_HK = cache[f"blocks.{layer}.attn.hook_z"][0, -1]
        for head, z_K in enumerate(z_HK):
            o_proj = lm.model.model.layers[layer].self_attn.o_proj.weight
            added_D = o_proj[:, head * len(z_K) : (head + 1) * len(z_K)] @ z_K
            assert found[f"layer {layer} head {head}"] == pytest.approx(float(added_D @ direction_D), abs=1e-4)
        mlp_D = cache[f"blocks.{layer}.hook_mlp_out"][0, -1]
        assert found[f"layer {layer} MLP"] == pytest.approx(float(mlp_D @ direction_D), abs=1e-4)
    assert sum(found.values()) == pytest.approx(float(logits[0, -1, id_]), abs=1e-4)


def test_patching_restores_the_same_share(lm: LanguageModel, bridge: Any, ids_1T: Tensor) -> None:
    changed_1T = torch.tensor([lm.tokenizer.start_ids + lm.tokenizer.encode(CHANGED)])
    found = lm.patch(TEXT, CHANGED, "a", "o")
    one, other = (lm.tokenizer.encode(answer)[0] for answer in ("a", "o"))
    clean, cache = bridge.run_with_cache(ids_1T)
    start = float(bridge(changed_1T)[0, -1] @ _difference(one, other, clean.shape[-1]))
    whole = float(clean[0, -1] @ _difference(one, other, clean.shape[-1])) - start
    for layer, t in ((0, 5), (1, 5), (1, 22)):

        def put(stream_BTD: Tensor, place: str = f"blocks.{layer}.hook_resid_pre", t: int = t) -> None:
            stream_BTD[:, t] = cache[place][:, t]

        patched = bridge.run_with_hooks(changed_1T, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", changing(put))])
        share = (float(patched[0, -1] @ _difference(one, other, clean.shape[-1])) - start) / whole
        assert float(found.restores_LT[layer, t]) == pytest.approx(share, abs=2e-3)


def _difference(one: int, other: int, size: int) -> Tensor:
    direction_V = torch.zeros(size)
    direction_V[one], direction_V[other] = 1, -1
    return direction_V
