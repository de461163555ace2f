"""The state of a training run: with its config and tensors, all that resuming needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minitf.errors import MinitfError


@dataclass
class TrainState:
    """Saved in each checkpoint's `trainer_state.json`."""

    step: int = 0  # optimiser steps done
    num_steps: int = 0  # of the whole run, as planned then
    tokens: int = 0  # target tokens trained on
    train_s: float = 0.0  # in training steps
    warmup_s: float = 0.0  # of compilation and measurement before them
    elapsed_s: float = 0.0  # of wall time
    best_loss: float = float("inf")  # held-out nats per token of the checkpoint `best`
    last_val: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    aligned: bool = False  # whether heads that align source and target well were found
    aligning_heads: list[list[int]] = field(default_factory=list)  # their [layer, head], as last found

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TrainState":
        """The TrainState in a checkpoint's `trainer_state.json`. Raises MinitfError if it is incomplete or damaged."""
        for item in fields(cls):
            if item.name not in state:
                raise MinitfError(f"the checkpoint has no {item.name!r} in trainer_state.json: it cannot be resumed")
            value, kind = state[item.name], type(getattr(cls(), item.name))
            if type(value) is not kind or (kind is int and not 0 <= value < 1 << 53):
                raise MinitfError(
                    f"the checkpoint's trainer_state.json has {item.name}={str(value)[:50]!r}: not resumed"
                )
        return cls(**{item.name: state[item.name] for item in fields(cls)})
