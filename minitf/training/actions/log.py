"""A row of training numbers in metrics.jsonl."""

import torch

from minitf.system.hardware import Peak, measure_matmul
from minitf.training.context import RunContext
from minitf.training.flops import flops_per_token
from minitf.training.trainer import Trainer


class LogRow:
    """Logs the mean loss of the steps since the last row, their speed, and totals."""

    def __init__(self, context: RunContext) -> None:
        start = context.initial_state()
        self.flops_per_token = flops_per_token(context.model)
        hardware = context.hardware
        self.peak = Peak(hardware.peak_flops, lambda: measure_matmul(hardware.device, hardware.dtype))
        self.group_size = context.group.size
        self.row_tokens = start.tokens  # at the last row
        self.row_train_s = start.train_s

    def due(self, trainer: Trainer) -> bool:
        return trainer.advanced and (trainer.schedule.log.includes(trainer.state.step) or trainer.last)

    def __call__(self, trainer: Trainer) -> None:
        state = trainer.state
        trainer.saver.check()
        pending = trainer.take_pending()
        losses = torch.stack([loss for loss, _ in pending]).tolist()
        trainer.check_finite(sum(losses))
        tokens_per_s = (state.tokens - self.row_tokens) / (state.train_s - self.row_train_s)
        row = {
            "step": state.step,
            "loss": sum(losses) / len(losses),
            "lr": trainer.learning_rate,
            "grad_norm": float(pending[-1][1]),
            "tokens": state.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": round(self.peak.share(tokens_per_s * self.flops_per_token / self.group_size), 4),
            "train_s": round(state.train_s, 3),
            "warmup_s": round(state.warmup_s, 3),
            "elapsed_s": round(state.elapsed_s, 3),
        }
        trainer.budget.read(state.step, state.train_s)
        trainer.reporter.train_row(row, state.num_steps, trainer.budget.left_s)
        self.row_tokens = state.tokens
        self.row_train_s = state.train_s
