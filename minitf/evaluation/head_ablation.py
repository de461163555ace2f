"""Ablation: the held-out bits per byte that each attention head and each feed-forward layer saves."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.packing import fit
from minitf.data.scored import scored_pairs, scored_text
from minitf.data.tokenized_pairs import PairIds
from minitf.data.tokenized_text import Tokens
from minitf.edits import Head, without
from minitf.evaluate import LONGEST_WINDOW, HeldOut, data_of, evaluate_checkpoint
from minitf.interpretability.heads import NAMES, HeadScores, describe_head, head_scores
from minitf.interpretability.own_patterns import OwnPatterns

COLUMNS = {
    "previous_token": "prev", "induction": "indu", "same_word": "same", "first_token": "1st ", "this_token": "this",
    "nearby": "near", "entropy": "entr",
}  # fmt: skip
EXPLANATION = (
    "zero, mean: held-out bits per byte rise by this if the head (L1H0: layer 1,",
    "head 0) puts out zeros, or its mean. The rest is where its weight goes: to the",
    "previous token, the one after the same word's last occurrence (indu), that word",
    "(same), the 1st token, its own (this), the four before (near); entr 1: to all",
)
MAX_TRIED = 24  # heads that the greedy order tries at each step: those that matter least by themselves


@dataclass(frozen=True)
class HeadReport:
    """The scores of `head_scores`, and the importance of each head and feed-forward layer.

    `importance_LH`, of shape (layers, heads), and `mlp_importance_L` are the rise of held-out bits per byte when that
    part alone is zero; negative where the model predicts better without it. `mean_...`: when it is its mean instead.
    """

    whole: HeldOut
    importance_LH: Tensor
    mean_importance_LH: Tensor
    mlp_importance_L: Tensor
    mlp_mean_importance_L: Tensor
    scores: HeadScores

    def to_json(self) -> dict[str, Any]:
        """{"heads": [{"layer", "head", "importance", "does", SCORE: value, ...}, ...], "mlps": [...]}, by layer."""
        num_layers, num_heads = self.importance_LH.shape
        return {
            **asdict(self.whole),
            "heads": [
                {
                    "layer": layer,
                    "head": head,
                    "importance": round(float(self.importance_LH[layer, head]), 6),
                    "importance_mean": round(float(self.mean_importance_LH[layer, head]), 6),
                    "does": describe_head(self.scores, layer, head),
                    **{name: round(float(values[layer, head]), 4) for name, values in self.scores.items()},
                }
                for layer in range(num_layers)
                for head in range(num_heads)
            ],
            "mlps": [
                {
                    "layer": layer,
                    "importance": round(float(self.mlp_importance_L[layer]), 6),
                    "importance_mean": round(float(self.mlp_mean_importance_L[layer]), 6),
                }
                for layer in range(num_layers)
            ],
        }

    def table(self) -> str:
        """How to read it, then a line per head, the most important first, then one per feed-forward layer."""
        columns = {name: COLUMNS.get(name, name) for name in (*NAMES, *self.scores) if name in self.scores}
        lines = [*EXPLANATION, f"{'':<6}{'zero':>8}{'mean':>9}  {'  '.join(columns.values())}  does"]
        content = self.to_json()
        for one in sorted(content["heads"], key=lambda head: -head["importance"]):
            values = "  ".join(f"{one[name]:>{len(column)}.2f}" for name, column in columns.items())
            lines.append(f"{_costs('L{layer}H{head}', one)}  {values}  {one['does'].rpartition(' ')[0]}".rstrip())
        return "\n".join([*lines, *(_costs("L{layer}MLP", one) for one in content["mlps"])])


def _costs(name: str, part: Mapping[str, Any]) -> str:
    return f"{name.format_map(part):<6}{part['importance']:>+8.4f}{part['importance_mean']:>+9.4f}"


def evaluate_heads(
    checkpoint: Checkpoint,
    tokens: Tokens | PairIds,
    num_bytes: int,
    max_tokens: int | None = None,
    patterns: OwnPatterns | None = None,
) -> HeadReport:
    """Score every head and ablate each head and feed-forward layer in turn, by zero and by its mean.

    A mean is that over a batch of held-out text (some 4,000 tokens). `patterns` are scores of the user's own.
    """
    c = checkpoint.model.config
    whole = evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens)

    def importance(heads: Sequence[Head] | None, mlp: int | None, by: str) -> float:
        edits = [without(heads, mlp, by)]
        return evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens, edits).bits_per_byte - whole.bits_per_byte

    by_heads = {by: torch.zeros(c.num_layers, c.num_heads) for by in ("zero", "mean")}
    by_mlps = {by: torch.zeros(c.num_layers) for by in ("zero", "mean")}
    for layer in range(c.num_layers):
        for by in by_heads:
            for head in range(c.num_heads):
                by_heads[by][layer, head] = importance([(layer, head)], None, by)
            by_mlps[by][layer] = importance(None, layer, by)
        print(f"layer {layer}: {c.num_heads} heads and the MLP ablated, one at a time", file=sys.stderr)
    context = min(c.context_length, LONGEST_WINDOW)
    if isinstance(tokens, PairIds):
        scored = scored_pairs(tokens, fit(tokens, context, data_of(checkpoint).long_pairs)[0], context)
    else:
        scored = scored_text(tokens, context, checkpoint.tokenizer.end_id if checkpoint.document_mask else None)
    scores = head_scores(checkpoint.model, *scored)
    if patterns is not None:
        scores |= patterns.scores(checkpoint.model, checkpoint.tokenizer, scored.ids_BT, scored.segments_BT)
    return HeadReport(whole, by_heads["zero"], by_heads["mean"], by_mlps["zero"], by_mlps["mean"], scores)


@dataclass(frozen=True)
class KeptHeads:
    """How few heads a model needs: `removed[i]` is the head removed i-th, `bits_per_byte[i]` what i removed heads cost.

    `bits_per_byte` has one value more than `removed`: the first is that of the whole model.
    """

    removed: list[Head]
    bits_per_byte: list[float]

    def to_json(self) -> dict[str, Any]:
        """{"order": [{"kept", "removed": [layer, head] or None, "bits_per_byte"}, ...]}."""
        total = len(self.removed)
        rows = zip([None, *self.removed], self.bits_per_byte, strict=True)
        return {
            "order": [
                {"kept": total - i, "removed": head and list(head), "bits_per_byte": round(bits, 6)}
                for i, (head, bits) in enumerate(rows)
            ]
        }

    def table(self) -> str:
        """One line for each number of heads kept."""
        total, lines = len(self.removed), [f"{'heads kept':>10}  {'bits per byte':>13}  removed last"]
        for row in self.to_json()["order"]:
            last = "" if row["removed"] is None else "layer {} head {}".format(*row["removed"])
            lines.append(f"{row['kept']:>4} of {total:<3}  {row['bits_per_byte']:>13.4f}  {last}".rstrip())
        return "\n".join(lines)


def order_heads(
    checkpoint: Checkpoint, tokens: Tokens | PairIds, num_bytes: int, max_tokens: int, by: str = "zero"
) -> KeptHeads:
    """Remove the head that costs least, again and again, until none is left: greedy, as Michel et al. (2019) do.

    With more than MAX_TRIED heads left, only those that cost least by themselves are tried.
    """
    c = checkpoint.model.config

    def bits(removed: Sequence[Head]) -> float:
        edits = [without(removed, by=by)] if removed else []
        return evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens, edits).bits_per_byte

    every = [(layer, head) for layer in range(c.num_layers) for head in range(c.num_heads)]
    alone = {head: bits([head]) for head in every}
    left, removed, costs = sorted(every, key=alone.__getitem__), list[Head](), [bits([])]
    while left:
        tried = {head: bits([*removed, head]) for head in left[:MAX_TRIED]} if removed else alone
        cheapest = min(tried, key=tried.__getitem__)
        removed.append(cheapest)
        costs.append(tried[cheapest])
        left.remove(cheapest)
    return KeptHeads(removed, costs)


def record_heads(report: HeadReport, run_dir: Path, step: int) -> None:
    """Write the report for TensorBoard and as JSON to `run_dir/heads/`.

    It is a directory of its own because TensorBoard stops reading the event file of a run that is still training once a
    newer one lies next to it.
    """
    from torch.utils.tensorboard import SummaryWriter

    from minitf.interpretability.picture import heads_picture
    from minitf.tensorboard.summary import picture_summary

    directory, content = run_dir / "heads", report.to_json()
    with SummaryWriter(str(directory)) as writer:
        summary = picture_summary("heads/importance", heads_picture(report.importance_LH, report.scores, step))
        writer._get_file_writer().add_summary(summary, step)
        table = "\n".join("    " + line for line in report.table().splitlines())
        writer.add_text("heads", table, step)
        for one in content["heads"]:
            writer.add_scalar(f"importance/layer{one['layer']}_head{one['head']}", one["importance"], step)
    text = json.dumps({"step": step, **content}, indent=2) + "\n"
    (directory / f"step_{step:08d}.json").write_text(text, encoding="utf-8")
