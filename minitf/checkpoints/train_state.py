"""All of a training run that changes: with its config, exactly what resuming needs beside the tensors."""

from dataclasses import dataclass, field, fields
from typing import Any

from minitf.errors import MinitfError


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0  # optimiser steps done
    num_steps: int = 0  # steps of the whole run, which its schedule depends on
    num_steps_final: bool = False  # whether a run that ends by the clock has corrected them by its real speed
    tokens: int = 0  # target tokens trained on
    train_s: float = 0.0  # seconds in training steps
    warmup_s: float = 0.0  # seconds of compilation and first steps before the training
    elapsed_s: float = 0.0  # wall seconds
    best_loss: float = float("inf")  # held-out nats per token of the checkpoint `best`
    last_val: dict[str, float] = field(default_factory=dict)  # newest held-out metrics
    aligned: bool = False  # whether the newest look found heads that align pairs well
    aligning_heads: list[list[int]] = field(
        default_factory=list
    )  # [layer, head] of those that align pairs, by the newest look

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "TrainState":
        """The part of a checkpoint's `trainer_state.json` that is a TrainState."""
        for item in fields(cls):
            if item.name not in state:
                raise MinitfError(f"the checkpoint has no {item.name!r} in trainer_state.json: it cannot be resumed")
            value, kind = state[item.name], type(getattr(cls(), item.name))
            if type(value) is not kind or (kind is int and not 0 <= value < 1 << 53):
                raise MinitfError(
                    f"the checkpoint's trainer_state.json has {item.name}={str(value)[:50]!r}: not resumed"
                )
        return cls(**{item.name: state[item.name] for item in fields(cls)})
