"""Head ablation: the pattern each attention head follows, and the held-out bits per byte it saves."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.tokenized_text import Tokens
from minitf.evaluate import HeldOut, evaluate_checkpoint
from minitf.interpretability.heads import NAMES, HeadScores, describe_head, head_scores, heads_off


@dataclass(frozen=True)
class HeadReport:
    """The scores of `head_scores`, and the importance of each head.

    `importance_LH`, of shape (layers, heads), is the rise of held-out bits per byte when that head alone is switched
    off; negative where the model predicts better without it.
    """

    whole: HeldOut
    importance_LH: Tensor
    scores: HeadScores

    def to_json(self) -> dict[str, Any]:
        """{"heads": [{"layer", "head", "importance", "does", SCORE: value, ...}, ...]}, by layer and head."""
        num_layers, num_heads = self.importance_LH.shape
        return {
            **asdict(self.whole),
            "heads": [
                {
                    "layer": layer,
                    "head": head,
                    "importance": round(float(self.importance_LH[layer, head]), 6),
                    "does": describe_head(self.scores, layer, head),
                    **{name: round(float(values[layer, head]), 4) for name, values in self.scores.items()},
                }
                for layer in range(num_layers)
                for head in range(num_heads)
            ],
        }

    def table(self) -> str:
        """One line per head, the most important first."""
        names = [name for name in (*NAMES, "entropy") if name in self.scores]
        header = "  ".join(["layer", "head", "importance", *names, "does"])
        lines = [header]
        for one in sorted(self.to_json()["heads"], key=lambda head: -head["importance"]):
            values = "  ".join(f"{one[name]:>{len(name)}.2f}" for name in names)
            lines.append(
                f"{one['layer']:>5}  {one['head']:>4}  {one['importance']:>+10.4f}  {values}  {one['does']}".rstrip()
            )
        return "\n".join(lines)


def evaluate_heads(checkpoint: Checkpoint, tokens: Tokens, num_bytes: int, max_tokens: int | None = None) -> HeadReport:
    """Score every head and ablate each in turn: one evaluation per head, and one of the whole model."""
    model = checkpoint.model
    c = model.config
    whole = evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens)
    importance_LH = torch.zeros(c.num_layers, c.num_heads)
    for layer in range(c.num_layers):
        for head in range(c.num_heads):
            with heads_off(model, [(layer, head)]):
                without = evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens)
            importance_LH[layer, head] = without.bits_per_byte - whole.bits_per_byte
        print(f"layer {layer}: {c.num_heads} heads switched off, one at a time", file=sys.stderr)
    windows = max(len(tokens) // c.context_length, 1)
    text_BT = torch.from_numpy(tokens[: min(windows, 4) * c.context_length].astype("int64"))
    scores = head_scores(model, text_BT.view(min(windows, 4), -1))
    return HeadReport(whole, importance_LH, scores)


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
