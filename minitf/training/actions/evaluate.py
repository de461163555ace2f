"""Held-out metrics, and samples of what the model writes."""

from dataclasses import asdict

import torch

from minitf.interpretability.attention_maps import ARROW
from minitf.interpretability.heads import evaluating
from minitf.training.task import Sample
from minitf.training.trainer import Trainer

MAX_ANSWERS_SHOWN = 16  # in TensorBoard's table


class Evaluate:
    """Computes held-out metrics and has the model continue a held-out text, or answer held-out sources."""

    def __init__(self) -> None:
        self.step = -1  # of the last evaluation
        self.is_best = False  # whether its loss was lower than all before
        self.sample: tuple[str, str] | None = None  # a prompt and what the model wrote, of the last evaluation with one

    def due(self, trainer: Trainer) -> bool:
        return trainer.advanced and (trainer.schedule.evaluate.includes(trainer.state.step) or trainer.last)

    def __call__(self, trainer: Trainer) -> None:
        context, state = trainer.context, trainer.state
        with torch.no_grad(), evaluating(context.model):
            result = context.task.held_out(
                context.parallel.loss_value,
                context.config.model.context_length,
                trainer.rows_at_once,
                context.hardware.device,
                trainer.config.eval_tokens,
            )
        context.parallel.reshard()
        trainer.check_finite(result.loss)
        self.step = state.step
        self.is_best = result.loss < state.best_loss
        state.best_loss = min(state.best_loss, result.loss)
        samples, scores = self.write_samples(trainer)
        state.last_val = asdict(result) | scores
        row = {"step": state.step, "tokens": state.tokens, "train_s": round(state.train_s, 3)}
        trainer.reporter.val_row(row | state.last_val)
        self._show(samples, trainer)

    def write_samples(self, trainer: Trainer) -> tuple[list[Sample], dict[str, float]]:
        """Samples and their metrics, on rank 0."""
        context, config = trainer.context, trainer.config
        model = context.parallel.full_model()
        if not trainer.group.is_main:
            return [], {}
        # Token by token, casting the float32 weights takes longer than bfloat16 products save; on CUDA they are cast
        # once.
        dtype = context.hardware.dtype if context.hardware.device.type == "cuda" else torch.float32
        with torch.no_grad(), evaluating(model), model.computing_in(dtype):
            return context.task.samples(model, config.sample_tokens, config.eval_answers)

    def _show(self, samples: list[Sample], trainer: Trainer) -> None:
        if not samples:
            return
        first = samples[0]
        self.sample = first.prompt + (ARROW if first.reference is not None else ""), first.text
        answers = [(s.prompt, s.text, s.reference) for s in samples[:MAX_ANSWERS_SHOWN] if s.reference is not None]
        if answers:
            trainer.reporter.answers(answers, trainer.state.step)
        else:
            trainer.reporter.sample(first.prompt, first.text, trainer.state.step)
