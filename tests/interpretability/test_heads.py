"""Ablation of heads, and the induction head: the head that the score finds is the one the model needs."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_text, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from minitf.attention import AttentionContext, AttentionRecord, gather, match, weigh
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.cli.evaluate import main as evaluate_command
from minitf.data.batches import document_segments
from minitf.data.config import DataConfig
from minitf.errors import RequestError
from minitf.evaluate import evaluate_checkpoint
from minitf.evaluation.head_ablation import evaluate_heads
from minitf.interpretability.attention_maps import attention_maps_of_ids
from minitf.interpretability.heads import (
    Head,
    ablation_costs,
    describe_head,
    head_pattern,
    head_scores,
    heads_off,
    pattern_scores,
)
from minitf.loss import IGNORED
from minitf.model import ModelConfig, Transformer
from minitf.reporting.metrics import JsonRows, other_curves
from minitf.tokenizer import TokenizerConfig
from minitf.training.task import open_task

MakeModel = Callable[..., Transformer]


def without_heads(model: Transformer, ids_BT: Tensor, off: set[Head]) -> Tensor:
    """Logits of a forward pass written out, in which the outputs of some heads are zero before `o_proj`."""
    T, config = ids_BT.shape[1], model.config
    x_BTD = model.model.embed_tokens(ids_BT)
    for index, block in enumerate(model.model.layers):
        record: list[AttentionRecord] = []
        block(x_BTD, AttentionContext(model.rotary[:, :T], torch.float32, record=record))
        attention, normed = block.self_attn, block.input_layernorm(x_BTD)
        v_BHSK = attention.v_proj(normed).view(*ids_BT.shape, -1, config.head_dim).transpose(1, 2)
        mixed_BHTK = gather(record[0].weights_BHTS, v_BHSK).clone()
        for layer, head in off:
            if layer == index:
                mixed_BHTK[:, head] = 0
        x_BTD = x_BTD + attention.o_proj(mixed_BHTK.transpose(1, 2).flatten(2))
        x_BTD = x_BTD + block.mlp(block.post_attention_layernorm(x_BTD))
    return model.model.norm(x_BTD) @ model.vocabulary_VD.T


@pytest.mark.parametrize("off", [set(), {(0, 1)}, {(1, 3)}, {(0, 0), (0, 3), (1, 2)}])
@torch.no_grad()
def test_a_head_that_is_off_contributes_nothing(make_model: Callable[..., Transformer], off: set[Head]) -> None:
    model = make_model()
    ids_BT = torch.randint(50, (2, 9))
    with heads_off(model, off):
        torch.testing.assert_close(model(ids_BT), without_heads(model, ids_BT, off), rtol=1e-4, atol=1e-4)
    if off:
        with heads_off(model, off):
            changed = model(ids_BT)
        assert not torch.allclose(changed, model(ids_BT), atol=1e-2)


def test_heads_off_restores_the_model_after_errors(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), heads_off(model, [(0, 0), (1, 1)]):
        raise ZeroDivisionError
    with pytest.raises(RequestError, match="layer 2, head 0"), heads_off(model, [(0, 0), (2, 0)]):
        pass
    with pytest.raises(RequestError, match="there is no"), heads_off(model, [(0, -1)]):
        pass
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_vectors_reproduce_the_weights_and_outputs(
    make_model: Callable[..., Transformer], num_kv_heads: int, qk_norm: bool
) -> None:
    class Pieces:
        def pieces(self, ids: list[int]) -> list[str]:
            return [str(id_) for id_ in ids]

    model = make_model(num_kv_heads=num_kv_heads, qk_norm=qk_norm)
    gathered: list[Tensor] = []
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: gathered.append(inputs[0]))
        for block in model.model.layers
    ]
    maps = attention_maps_of_ids(model, Pieces(), list(range(11)), "")  # type: ignore[arg-type]
    for hook in hooks:
        hook.remove()
    assert maps.vectors is not None
    q_LHTK, k_LGTK, v_LGTK, mixed_LHTK = vars(maps.vectors).values()
    mask_TS = torch.full((11, 11), -torch.inf).triu(1)
    for layer in range(2):
        weights = weigh(match(q_LHTK[layer][None], k_LGTK[layer][None], mask_TS))
        torch.testing.assert_close(weights[0], maps.weights_LHTS[layer])
        mixed_BHTK = gather(weights, v_LGTK[layer][None])
        torch.testing.assert_close(mixed_BHTK[0], mixed_LHTK[layer])
        torch.testing.assert_close(mixed_BHTK.transpose(1, 2).flatten(2), gathered[layer])
    assert maps.to_viewer()["standard_formula"]


def test_an_edited_formula_is_not_shown_as_the_standard_one(
    make_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make_model(), SimpleNamespace(pieces=lambda ids: [str(id_) for id_ in ids])
    for step, edited in {
        "match": lambda q, k, mask: match(q * 0.5, k, mask),
        "weigh": lambda scores: weigh(scores).square(),
        "gather": lambda weights, v: gather(weights, v) * 2,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"minitf.attention.{step}", edited)
            maps = attention_maps_of_ids(model, tokenizer, list(range(11)), "")  # type: ignore[arg-type]
        assert not maps.to_viewer()["standard_formula"], step


def test_nearby_and_broad_heads_are_named() -> None:
    size = 40
    weights_LHBTS = torch.zeros(1, 3, 1, size, size)
    for t in range(size):
        weights_LHBTS[0, 0, 0, t, max(t - 4, 0) : max(t, 1)] = 1
        weights_LHBTS[0, 1, 0, t, : t + 1] = 1
        weights_LHBTS[0, 2, 0, t, t // 2] = 1
    scores = pattern_scores(weights_LHBTS / weights_LHBTS.sum(-1, keepdim=True))
    assert head_pattern(scores, 0, 0) == ("nearby", pytest.approx(1))
    assert head_pattern(scores, 0, 1) == ("broad", pytest.approx(1))
    assert head_pattern(scores, 0, 2) is None
    assert [describe_head(scores, 0, head) for head in range(3)] == ["nearby tokens 1.00", "broad 1.00", ""]


CONTEXT, VOCABULARY = 32, 64


def repetitions(num_rows: int, generator: torch.Generator, shortest: int = 10) -> tuple[Tensor, Tensor]:
    """Repeated sequences of random tokens, with a period of `shortest` to 16: (ids_BT, targets_BT).

    The period differs from row to row, so that looking back by a fixed distance does not help. Only repeated
    tokens can be predicted; the others are not targets.
    """
    ids_BT = torch.randint(VOCABULARY, (num_rows, CONTEXT), generator=generator)
    period_B1 = torch.randint(shortest, CONTEXT // 2 + 1, (num_rows, 1), generator=generator)
    position_BT = torch.arange(CONTEXT).expand(num_rows, -1)
    ids_BT = ids_BT.gather(1, position_BT % period_B1)
    targets_BT = ids_BT.roll(-1, 1)
    targets_BT[position_BT < period_B1 - 1] = targets_BT[:, -1] = -100
    return ids_BT, targets_BT


@torch.no_grad()
def copying(model: Transformer, generator: torch.Generator) -> float:
    """The share of repeated tokens that the model predicts."""
    ids_BT, targets_BT = repetitions(256, generator)
    known_BT = targets_BT >= 0
    return float((model(ids_BT).argmax(-1) == targets_BT)[known_BT].float().mean())


@pytest.mark.slow
def test_an_induction_head_forms_and_copying_depends_on_it() -> None:
    """Two layers learn to repeat; ablating the heads with a high induction score destroys that, others do not."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    shape = ModelConfig(
        num_layers=2, hidden_size=64, num_heads=2, context_length=CONTEXT, intermediate_size=64,
        tie_embeddings=False, rope_theta=10.0,
    )  # fmt: skip
    model = Transformer(shape, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    held_out_BT = repetitions(4, generator)[0]
    assert float(head_scores(model, held_out_BT)["induction"].max()) < 0.2
    for step in range(2000):
        model.loss(*repetitions(64, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 and copying(model, generator) > 0.97:
            break
    model.eval()
    scores = head_scores(model, held_out_BT)
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    value = {head: float(scores["induction"][head]) for head in heads}
    found = [head for head in heads if describe_head(scores, *head).startswith("induction")]
    assert max(value.values()) > 0.6
    assert found
    assert all(layer == 1 for layer, _ in found)  # it needs a previous-token head in an earlier layer
    assert copying(model, generator) > 0.95
    with heads_off(model, found):
        assert copying(model, generator) < 0.4
    for head in {(1, 0), (1, 1)} - set(found):
        with heads_off(model, [head]):
            assert copying(model, generator) > 0.8
    assert copying(model, generator) > 0.95


def test_heads_of_a_run_on_pairs_are_scored_on_whole_pairs_by_themselves(copying_run: Path) -> None:
    checkpoint = load_checkpoint(copying_run, "cpu")
    tokenizer = checkpoint.tokenizer
    task = open_task(DataConfig(**checkpoint.state["data"]), TokenizerConfig(), tokenizer)
    task.batches(CONTEXT, batch_size=8, seed=0)
    ids_BT, targets_BT, segments_BT = task.window(CONTEXT)
    assert targets_BT is not None
    assert segments_BT is not None
    assert ids_BT.shape == targets_BT.shape == segments_BT.shape
    assert int(segments_BT.max()) > 1  # several pairs in a row
    for ids_T, targets_T, segments_T in zip(ids_BT, targets_BT, segments_BT, strict=True):
        assert (targets_T[segments_T == 0] == IGNORED).all()  # padding
        for segment in range(1, int(segments_T.max()) + 1):
            pair = tokenizer.pieces(ids_T[segments_T == segment].tolist())
            counted = targets_T[(segments_T == segment) & (targets_T != IGNORED)].tolist()
            source, target = "".join(pair).removeprefix("<|source|>").split("<|target|>")
            assert source == target
            assert counted == [*tokenizer.encode(target), tokenizer.end_id]

    scores = head_scores(checkpoint.model, *task.window(CONTEXT))
    entropy = {(layer, head): float(scores["entropy"][layer, head]) for layer in range(2) for head in range(4)}
    aligning = checkpoint.aligning_heads
    assert aligning
    sharpest = min(entropy, key=entropy.__getitem__)
    assert sharpest in aligning
    assert not describe_head(scores, *sharpest).startswith("broad")  # of the others, training decides


def test_heads_of_a_run_on_documents_are_scored_inside_them(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number} sheep went."}) + "\n" for number in range(200)))
    task = open_task(DataConfig(source="files", files=[str(file)], document_mask=True), TokenizerConfig(kind="byte"))
    ids_BT, targets_BT, segments_BT = task.window(CONTEXT)
    assert targets_BT is None
    assert segments_BT is not None
    assert torch.equal(segments_BT, document_segments(ids_BT, task.tokenizer.end_id))  # type: ignore[arg-type]
    assert int(segments_BT[0].max()) > 1
    assert ids_BT.numel() == min(512, len(task.text.val) // CONTEXT * CONTEXT)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_importance_of_a_head_is_the_cost_of_its_ablation(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    assert evaluate_command(["--run", str(run), "--heads", "--json", "--max-tokens", "600"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert evaluate_command(["--run", str(run), "--json", "--max-tokens", "600"]) == 0
    assert report["bits_per_byte"] == json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert [(one["layer"], one["head"]) for one in report["heads"]] == [(i, j) for i in range(2) for j in range(4)]

    checkpoint = load_checkpoint(run, "cpu")
    text = make_text(600)
    ids = np.array(checkpoint.tokenizer.encode(text), dtype=np.uint32)
    found = evaluate_heads(checkpoint, ids, len(text.encode()), 600)
    whole = evaluate_checkpoint(checkpoint, ids, len(text.encode()), 600).bits_per_byte
    with heads_off(checkpoint.model, [(1, 2)]):
        without = evaluate_checkpoint(checkpoint, ids, len(text.encode()), 600).bits_per_byte
    assert float(found.importance_LH[1, 2]) == pytest.approx(without - whole, abs=1e-6)
    table = found.table().splitlines()
    assert all(len(line) <= 80 for line in table)
    rows = [line.split() for line in table[5:]]
    assert len(rows) == 10  # two layers of four heads, and their two MLPs
    values = [float(row[1]) for row in rows[:8]]
    assert values == sorted(values, reverse=True)

    # TensorBoard needs a directory of its own: a newer event file would hide later records of a training run.
    assert len(list(run.glob("events.out.*"))) == 1
    assert len(list((run / "heads").glob("events.out.*"))) == 1
    written = json.loads((run / f"heads/step_{checkpoint.step:08d}.json").read_text())
    assert written["heads"] == report["heads"]
    reader = EventAccumulator(str(run / "heads"), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()
    assert reader.Tags()["images"] == ["heads/importance"]
    assert len(reader.Tags()["scalars"]) == 8
    assert reader.Scalars("importance/layer1_head2")[0].value == pytest.approx(report["heads"][6]["importance"])


def test_ablation_at_each_look_is_the_rise_of_the_loss_without_the_head(
    tiny: list[str], workdir: Path, make_model: MakeModel
) -> None:
    settings = ["trainer.max_steps=2", "trainer.attention_every=1", "attention.ablation=true", "run_dir=run"]
    assert train_here(*tiny, *settings) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["split"] == "ablation"]
    assert [row["step"] for row in found] == [0, 1, 2]
    assert torch.tensor(found[0]["bits_per_token"]).abs().max() == 0  # the output projections are zero at first
    assert torch.tensor(found[2]["bits_per_token"]).shape == (2, 4)
    curves = other_curves(JsonRows(Path("run/metrics.jsonl"), 2))
    assert len(curves["ablation/layer1_head3"]) == 3

    model, ids_BT = make_model(24), torch.arange(24).view(2, 12)
    targets_BT = torch.cat([ids_BT[:, 1:], torch.full((2, 1), -100)], 1)
    with torch.no_grad(), heads_off(model, [(1, 2)]):
        without = float(model.eval().loss(ids_BT, targets_BT))
    with torch.no_grad():
        whole = float(model.loss(ids_BT, targets_BT))
    costs_LH = ablation_costs(model, ids_BT)
    assert float(costs_LH[1, 2]) == pytest.approx((without - whole) / math.log(2), abs=1e-6)
    assert float(costs_LH.abs().min()) > 0
