"""What follows from the number of steps of a run: the learning rate of each step, and when each action is due.

A run with a time limit changes its number of steps as it learns how fast the machine is. Both classes here then `move`
to the new number without a jump. What they hold follows from the moves alone: a resumed run repeats them.
"""

from dataclasses import dataclass, replace

from minitf.optim import OptimConfig, schedule_bounds, schedule_factor
from minitf.training.trainer_config import TrainerConfig

# Times in a run, where no interval is set.
NUM_TRAIN_ROWS = 200
NUM_CHECKPOINTS = 8
NUM_ATTENTION_LOGS = 10
NUM_ALIGNMENT_LOGS = 40
# The first of these numbers of evaluations that takes at most this share of the time of the steps.
NUM_EVALUATIONS = (8, 4, 2)
MAX_EVALUATION_SHARE = 0.25
FORWARD_SPEEDUP = 3  # of a forward pass alone, over a step


@dataclass(frozen=True)
class LearningRate:
    """The learning rate over a run of `num_steps`, as a share of its peak.

    `schedule_factor` is followed from `position`, which the run had reached after the step `since`, to its end; both
    are 0 in a run that never moved. Before `since` it waits at `position`.
    """

    config: OptimConfig
    num_steps: int
    falls_from: float  # the step from which on the rate falls
    since: float = 0
    position: float = 0.0

    @classmethod
    def of(cls, config: OptimConfig, num_steps: int) -> "LearningRate":
        return cls(config, num_steps, schedule_bounds(config, num_steps)[1])

    def factor(self, step: int) -> float:
        return schedule_factor(self.config, self._position(step), self.num_steps)

    def moved(self, step: int, num_steps: int) -> "LearningRate":
        """The rate if the run has `num_steps`, from after `step` on.

        A rising or falling rate goes on from where it is. Where it is constant, only the number of steps counts, as if
        it had been known from the start; if it should fall already, it begins to. If it fell too early (`wsd`), it
        waits where it is until it should.
        """
        position, after_last = self._position(step), num_steps + 1
        rises_to, falls_from = schedule_bounds(self.config, self.num_steps)
        new_rises_to, new_falls_from = schedule_bounds(self.config, num_steps)
        if position < rises_to:
            new_position = position * new_rises_to / rises_to
        elif position <= falls_from:
            new_position = min(max(float(step), new_rises_to), new_falls_from)
        else:
            left = (self.num_steps + 1 - position) / (self.num_steps + 1 - falls_from)
            new_position = after_last - left * (after_last - new_falls_from)
            if self.config.schedule == "wsd" and step < new_falls_from:
                return LearningRate(self.config, num_steps, new_falls_from, new_falls_from, new_position)
        begun = min(self.falls_from, step)
        if new_position < new_falls_from:
            begun = after_last - (after_last - new_falls_from) * (after_last - step) / (after_last - new_position)
        return LearningRate(self.config, num_steps, begun, step, new_position)

    @property
    def falling_share(self) -> float:
        """The share of the steps in which the rate falls."""
        return max(0.0, self.num_steps + 1 - self.falls_from) / self.num_steps

    def _position(self, step: float) -> float:
        """Where on the curve `step` is: at the step itself, unless the number of steps has changed."""
        after_last = self.num_steps + 1
        step = max(step, self.since)
        return after_last - (after_last - step) * (after_last - self.position) / (after_last - self.since)


@dataclass(frozen=True)
class Interval:
    """An action due every `steps` steps after `last`, when it was due last; not at the steps before `since`."""

    steps: int
    last: int = 0
    since: int = 0

    def includes(self, step: int) -> bool:
        """Whether the action is due at `step`."""
        return step >= self._first and (step - self._first) % self.steps == 0

    def last_before(self, step: int) -> int:
        """The last step before `step` at which it was due."""
        if step <= self._first:
            return self.last
        return self._first + (step - 1 - self._first) // self.steps * self.steps

    @property
    def _first(self) -> int:
        return max(self.last + self.steps, self.since)


@dataclass(frozen=True)
class Schedule:
    """When each action of a run of `num_steps` is due."""

    log: Interval
    align: Interval
    evaluate: Interval
    attention: Interval
    save: Interval

    @classmethod
    def of(cls, config: TrainerConfig, num_steps: int, steps_per_evaluation: float) -> "Schedule":
        """Of a run of `num_steps`, in which an evaluation takes as long as `steps_per_evaluation` steps."""
        wanted = _intervals_and_times(config, num_steps, steps_per_evaluation)
        # Rounded up: the last time falls on the last step, not just before it.
        return cls(**{name: Interval(steps or -(-num_steps // times)) for name, (steps, times) in wanted.items()})

    def moved(self, step: int, config: TrainerConfig, num_steps: int, steps_per_evaluation: float) -> "Schedule":
        """The schedule if the run has `num_steps`, from `step` on; the last times still fall on the last step."""
        moved = {}
        for name, (steps, times) in _intervals_and_times(config, num_steps, steps_per_evaluation).items():
            last = getattr(self, name).last_before(step)
            left = max(1, num_steps - last)
            times_left = max(1, round(left / -(-num_steps // times)))
            moved[name] = Interval(steps or -(-left // times_left), last, step)
        return replace(self, **moved)


def _intervals_and_times(
    config: TrainerConfig, num_steps: int, steps_per_evaluation: float
) -> dict[str, tuple[int, int]]:
    """For each action the interval that is set, or 0; and its number of times in a run where none is set."""
    max_evaluation = MAX_EVALUATION_SHARE * num_steps
    fitting = (times for times in NUM_EVALUATIONS if times * steps_per_evaluation <= max_evaluation)
    return {
        "log": (config.log_every, NUM_TRAIN_ROWS),
        "align": (0, NUM_ALIGNMENT_LOGS),
        "evaluate": (config.eval_every, next(fitting, NUM_EVALUATIONS[-1])),
        "attention": (max(0, config.attention_every), NUM_ATTENTION_LOGS),
        "save": (config.save_every or config.eval_every, NUM_CHECKPOINTS),
    }
