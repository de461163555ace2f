"""Snapshots of the weights at every look."""

from dataclasses import asdict

from minitf.errors import MinitfError
from minitf.training.actions.reference import due
from minitf.training.trainer import Trainer


class SaveSnapshot:
    """Saves the weights alone as often as what the model does is measured. Failing, it stops; training does not."""

    def __init__(self) -> None:
        self.failed = False

    def due(self, trainer: Trainer) -> bool:
        return trainer.snapshots.most > 0 and due(trainer)

    def __call__(self, trainer: Trainer) -> None:
        trainer.check_model()
        context, state = trainer.context, trainer.state
        model = context.parallel.full_model()
        if not trainer.group.is_main or self.failed:
            return
        content = {
            "step": state.step,
            "aligning_heads": state.aligning_heads,
            "data": asdict(context.task.data),
            "text_fingerprint": context.task.fingerprint,
        }
        try:
            trainer.snapshots.save(model, context.task.tokenizer, content)
        except (OSError, MinitfError) as error:  # of the previous one
            self.failed = True
            trainer.reporter.say(f"no more snapshots: the last one could not be written: {error}")
