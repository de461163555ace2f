"""How many steps a run takes: as its limits in steps and minutes say."""

from minitf.checkpoints.train_state import TrainState
from minitf.training.trainer_config import TrainerConfig


def estimate_num_steps(config: TrainerConfig, state: TrainState, step_s: float) -> int:
    """Steps of the whole run, those done included, if each of the others takes `step_s` seconds."""
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.minutes is not None:
        left_s = config.minutes * 60 - state.train_s
        limits.append(state.step + max(1, int(left_s / step_s)))
    return min(limits)
