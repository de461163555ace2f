"""Checkpoints of the model and of all that resuming needs."""

from dataclasses import asdict

from minitf.checkpoints.model_card import model_card
from minitf.training.actions.evaluate import Evaluate
from minitf.training.trainer import Trainer


class SaveCheckpoint:
    """Saves at intervals, after the best evaluation so far, after the last step, and before stopping."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate

    def due(self, trainer: Trainer) -> bool:
        at_interval = trainer.schedule.save.includes(trainer.state.step)
        return trainer.advanced and (at_interval or trainer.last or trainer.stopping or self._is_best(trainer))

    def __call__(self, trainer: Trainer) -> None:
        trainer.check_model()
        card = self._card(trainer) if trainer.group.is_main else ""
        trainer.save_checkpoint(self._is_best(trainer), card)

    def _is_best(self, trainer: Trainer) -> bool:
        return self.evaluate.is_best and self.evaluate.step == trainer.state.step

    def _card(self, trainer: Trainer) -> str:
        """The checkpoint's README.md."""
        context, config = trainer.context, trainer.context.config
        settings = {section: asdict(getattr(config, section)) for section in ("model", "optim", "trainer")}
        return model_card(
            context.run_dir.resolve().parent.name,
            context.model,
            context.task.data,
            context.task.description,
            trainer.state,
            settings,
            self.evaluate.sample,
            context.origin,
        )
