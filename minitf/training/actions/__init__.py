"""What the training loop does between its steps."""

from minitf.training.actions.attention import LogAlignment, LogAttention
from minitf.training.actions.checkpoint import SaveCheckpoint
from minitf.training.actions.evaluate import Evaluate
from minitf.training.actions.log import LogRow
from minitf.training.actions.reference import reference_actions
from minitf.training.actions.snapshot import SaveSnapshot
from minitf.training.context import RunContext
from minitf.training.trainer import Action

__all__ = [
    "Evaluate",
    "LogAlignment",
    "LogAttention",
    "LogRow",
    "SaveCheckpoint",
    "SaveSnapshot",
    "default_actions",
    "reference_actions",
]


def default_actions(context: RunContext) -> list[Action]:
    """All actions of a run, in the order in which they are done after a step."""
    evaluate = Evaluate()
    actions: list[Action] = [LogRow(context), evaluate, SaveCheckpoint(evaluate)]
    if context.config.trainer.attention_every >= 0:
        attention = LogAttention(context.config.attention.patterns)
        actions[1:2] = [LogAlignment(), evaluate, attention, *reference_actions(context), SaveSnapshot()]
    return actions
