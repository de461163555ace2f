"""How many steps a run takes: its limit of steps, and as many as its limit of minutes has time for.

With a time limit the number of steps is a plan, made anew about a hundred times from the recent speed. Until the
learning rate falls nothing depends on it but when that begins (`wsd`): when the time that is left is the time of the
decay. From then on each new plan bends the rate's line a little, so that it ends with the time. Other work on the
machine may begin the decay too early: when it is gone, the rate waits until the decay is due.
"""

from collections import deque

from minitf.optim import OptimConfig
from minitf.training.plan import LearningRate, Schedule
from minitf.training.trainer_config import TrainerConfig

PLANS_PER_RUN = 100
RECENT_SHARE = 0.05  # of the time: the window over which the current speed is measured

Plans = tuple[tuple[int, int], ...]  # (step, number of steps of the run as planned after it)


def estimate_num_steps(config: TrainerConfig, step: int, train_s: float, step_s: float) -> int:
    """Steps of a run, those done included, if each of the others takes `step_s` seconds; at least one more."""
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.max_minutes is not None:
        limits.append(step + max(1, round((config.max_minutes * 60 - train_s) / step_s)))
    return min(limits)


class Speed:
    """How long steps took of late, from readings of the training clock."""

    def __init__(self, step: int, train_s: float) -> None:
        """Steps before `step`, of an earlier process, are taken to have been equally long."""
        self.readings = deque([(0.0, 0)])
        self.read(step, train_s)

    def read(self, step: int, train_s: float) -> None:
        """After `step`, `train_s` seconds of training had passed."""
        if train_s > self.readings[-1][0]:
            self.readings.append((train_s, step))

    def step_s(self, window_s: float) -> float:
        """Seconds of a step over the last `window_s`; 0 if none was read."""
        end_s, end_step = self.readings[-1]
        window_s = min(window_s, end_s)
        num_steps = end_step - self._step_at(end_s - window_s)
        return window_s / num_steps if num_steps > 0 else 0.0

    def forget(self, before_s: float) -> None:
        """Discard readings older than `before_s`, except the newest of them, which `_step_at` interpolates from."""
        while len(self.readings) > 2 and self.readings[1][0] <= before_s:
            self.readings.popleft()

    def _step_at(self, train_s: float) -> float:
        """The step at a time, interpolated."""
        end_s, end_step = self.readings[-1]
        for start_s, start_step in reversed(self.readings):
            if start_s <= train_s:
                share = (train_s - start_s) / (end_s - start_s) if end_s > start_s else 0.0
                return start_step + share * (end_step - start_step)
            end_s, end_step = start_s, start_step
        return end_step


class StepBudget:
    """The number of steps of a run and all that follows from it: the learning rate, and when actions are due.

    `plans` are those of the run so far, in order. Those after the step it resumes from are repeated: `replay`.
    """

    def __init__(
        self,
        config: TrainerConfig,
        optim: OptimConfig,
        steps_per_evaluation: float,
        plans: Plans,
        num_steps: int = 0,
        step: int = 0,
        train_s: float = 0.0,
    ) -> None:
        """The run has done `step` steps in `train_s` seconds; `num_steps` are planned where there are no `plans`."""
        self.config, self.steps_per_evaluation = config, steps_per_evaluation
        self.limit_s = None if config.max_minutes is None else 60 * config.max_minutes
        self.plans = plans or ((0, num_steps),)
        # An earlier process went no further without another plan, and its steps are repeated as they were.
        self.repeated_to = plans[-1][0] + plans[-1][1] / PLANS_PER_RUN if plans else 0.0
        (_, num_steps), *self.ahead = self.plans
        self.rate = LearningRate.of(optim, num_steps)
        self.schedule = Schedule.of(config, num_steps, steps_per_evaluation)
        self.speed = Speed(step, train_s)
        self.planned = (0, train_s)
        self.read_last = (step, train_s)
        self.replay(step, train_s)

    @property
    def num_steps(self) -> int:
        """Of the whole run, as planned now."""
        return self.rate.num_steps

    def replay(self, step: int, train_s: float) -> None:
        """Take the plans on that an earlier process made at `step` or before."""
        while self.ahead and self.ahead[0][0] <= step:
            planned_at, num_steps = self.ahead.pop(0)
            self.planned = (planned_at, train_s)
            self._move(planned_at, num_steps)

    def due(self, step: int, train_s: float) -> bool:
        """Whether the number of steps is to be planned anew after `step`."""
        if self.limit_s is None or step <= self.plans[-1][0]:
            return False
        if step < self.repeated_to:
            return step == self.num_steps
        planned_at, planned_s = self.planned
        late = train_s - planned_s >= self.limit_s / PLANS_PER_RUN
        return late or step - planned_at >= self.num_steps / PLANS_PER_RUN or step == self.num_steps

    def propose(self, step: int, train_s: float) -> int:
        """The number of steps that the time suffices for; a run that has reached its last step ends there."""
        self.read(step, train_s)
        self.planned = (step, train_s)
        if self.limit_s is None or step >= self.num_steps:
            return self.num_steps
        step_s = self.recent_step_s()
        left = (self.limit_s - train_s) / step_s if step_s else self.num_steps - step
        num_steps = step + max(0, round(left))
        return num_steps if self.config.max_steps is None else min(num_steps, self.config.max_steps)

    def adopt(self, step: int, num_steps: int) -> None:
        """Follow a new plan from `step` on; it must be saved before: `with_plan`."""
        self.plans = self.with_plan(step, num_steps)
        self._move(step, num_steps)

    def with_plan(self, step: int, num_steps: int) -> Plans:
        """`plans` and a new one."""
        return (*self.plans, (step, num_steps))

    def read(self, step: int, train_s: float) -> None:
        """Note the training clock."""
        self.speed.read(step, train_s)
        self.read_last = (step, train_s)
        self.speed.forget(train_s - RECENT_SHARE * self._span_s)

    def recent_step_s(self) -> float:
        """Recent seconds per step; 0 if no step was timed."""
        return self.speed.step_s(RECENT_SHARE * self._span_s)

    @property
    def left_s(self) -> float:
        """Estimated seconds of training left."""
        return (self.num_steps - self.read_last[0]) * self.recent_step_s()

    @property
    def _span_s(self) -> float:
        """The length of the run; where no time limit says it, that so far."""
        return self.read_last[1] if self.limit_s is None else self.limit_s

    def _move(self, step: int, num_steps: int) -> None:
        self.rate = self.rate.moved(step, num_steps)
        self.schedule = self.schedule.moved(step, self.config, num_steps, self.steps_per_evaluation)
