"""A run trains as long as was asked, whatever the machine's speed does: simulated, by a clock that only steps move."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from minitf.optim import OptimConfig
from minitf.training.budget import Plans, Speed, StepBudget, estimate_num_steps
from minitf.training.trainer_config import TrainerConfig

Slowness = Callable[[float], float]  # share of the run's time -> how many times as long a step takes


def burst(begin: float, end: float, factor: float = 3.0) -> Slowness:
    return lambda share: factor if begin <= share < end else 1.0


def bursts(length: float, factor: float = 3.0) -> Slowness:
    """Other work that comes and goes: the machine is busy half of the time."""
    return lambda share: factor if share / length % 2 < 1 else 1.0


# While the rate has not begun to fall.
EARLY = {
    "steady": burst(0, 0),
    "slow first tenth": burst(0, 0.1, 8),
    "busy for a ninth at first": burst(0, 0.11, 3),
    "halved at a tenth": burst(0.1, 9, 2),
    "halved at three tenths": burst(0.3, 9, 2),
    "halved just before the decay": burst(0.42, 9, 2),
    "doubled at three tenths": burst(0.3, 9, 0.5),
    "doubled before the decay": burst(0.58, 9, 0.5),
    "a burst": burst(0.3, 0.4),
    "a burst before the decay": burst(0.45, 0.55),
    "short bursts": bursts(0.025),
    "bursts": bursts(0.05),
    "long bursts": bursts(0.1),
}
LATE = {
    "halved in the decay": burst(0.7, 9, 2),
    "doubled in the decay": burst(0.7, 9, 0.5),
    "a burst in the decay": burst(0.8, 0.9, 4),
    "halved near the end": burst(0.95, 9, 2),
    "doubled near the end": burst(0.95, 9, 0.5),
    "halved too late for the whole decay": burst(0.55, 9, 2),
    "a burst when the decay begins": burst(0.5, 0.6),
}
SIZES = {"small": (1.2, 0.005), "default": (180.0, 0.096), "large": (3600.0, 1.0), "few steps": (60.0, 0.5)}


@dataclass
class Simulation:
    """A run of `limit_s`, killed after the step `killed_at`."""

    budget: StepBudget
    step_s: float
    limit_s: float
    slowness: Slowness
    step: int = 0
    train_s: float = 0.0
    rates: dict[int, float] = field(default_factory=dict)
    due: list[tuple[int, str]] = field(default_factory=list)

    def run(self, killed_at: int = 1 << 30) -> "Simulation":
        """As the trainer does it."""
        while self.step < min(self.budget.num_steps, killed_at):
            self.step += 1
            self.rates[self.step] = self.budget.rate.factor(self.step)
            self.train_s += self.step_s * self.slowness(self.train_s / self.limit_s)
            self.budget.replay(self.step, self.train_s)
            if self.budget.due(self.step, self.train_s):
                self.budget.adopt(self.step, self.budget.propose(self.step, self.train_s))
            schedule = self.budget.schedule
            names = ("log", "evaluate", "attention", "save")
            self.due += [(self.step, name) for name in names if getattr(schedule, name).includes(self.step)]
        return self


def simulation(
    slowness: Slowness,
    size: str = "default",
    schedule: str = "wsd",
    plans: Plans = (),
    step: int = 0,
    train_s: float = 0.0,
    max_steps: int | None = None,
) -> Simulation:
    limit_s, step_s = SIZES[size]
    config = TrainerConfig(max_minutes=limit_s / 60, max_steps=max_steps)
    num_steps = estimate_num_steps(config, 0, 0.0, step_s * slowness(0.0))
    budget = StepBudget(config, OptimConfig(schedule=schedule), 30.0, plans, num_steps, step, train_s)
    return Simulation(budget, step_s, limit_s, slowness, step, train_s)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("name", [*EARLY, *LATE])
def test_training_takes_the_time_that_was_asked(name: str, schedule: str, size: str) -> None:
    done = simulation((EARLY | LATE)[name], size, schedule).run()
    assert done.train_s == pytest.approx(done.limit_s, rel=0.03)
    assert done.step == done.budget.num_steps == done.budget.plans[-1][0]
    rates = list(done.rates.values())
    assert min(rates) > 0
    assert max(before - rate for before, rate in itertools.pairwise(rates)) < 0.01 + 10 / len(rates)
    if schedule != "constant":
        assert rates[-1] < 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EARLY)
def test_decay_has_its_share_of_the_steps_if_the_speed_changes_before_it(name: str, size: str) -> None:
    done = simulation(EARLY[name], size).run()
    wanted = OptimConfig().decay_fraction
    within = 0.1 * wanted + 1 / done.step
    assert done.budget.rate.falling_share == pytest.approx(wanted, abs=within)
    backwards = itertools.pairwise(reversed(done.rates.values()))
    num_falling = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] < pair[1], backwards))
    assert num_falling / done.step == pytest.approx(wanted, abs=within)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("name", ["steady", "slow first tenth", "bursts", "halved in the decay"])
def test_resumed_run_has_the_schedule_of_the_uninterrupted_one(name: str, schedule: str) -> None:
    """At whatever step it was interrupted, and whatever the speed is then."""
    whole = simulation((EARLY | LATE)[name], schedule=schedule).run()
    for step in (1, 2, 17, 300, whole.step // 2, whole.step - 100, whole.step - 1):
        resumed = simulation(burst(0, 9, 5), schedule=schedule, plans=whole.budget.plans, step=step, train_s=1.0).run()
        assert resumed.rates == {at: rate for at, rate in whole.rates.items() if at > step}
        assert resumed.due == [(at, action) for at, action in whole.due if at > step]
        assert resumed.budget.plans == whole.budget.plans


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("killed_at", [5, 100, 777, 1200])
def test_run_killed_after_its_last_plan_repeats_all_steps_it_had_done(schedule: str, killed_at: int) -> None:
    killed = simulation(EARLY["bursts"], schedule=schedule).run(killed_at)
    assert killed.step == killed_at
    saved_at = killed_at // 2  # the checkpoint
    resumed = simulation(burst(0, 9, 2), schedule=schedule, plans=killed.budget.plans, step=saved_at, train_s=60.0)
    resumed.run()
    for step in range(saved_at + 1, killed.step + 1):
        assert resumed.rates[step] == killed.rates[step]
    assert [one for one in resumed.due if one[0] <= killed.budget.plans[-1][0]] == [
        one for one in killed.due if saved_at < one[0] <= killed.budget.plans[-1][0]
    ]
    assert resumed.budget.plans[: len(killed.budget.plans)] == killed.budget.plans
    assert resumed.train_s == pytest.approx(180, rel=0.03)


def test_actions_are_as_frequent_as_in_a_run_whose_length_is_known() -> None:
    for name, slowness in (EARLY | LATE).items():
        done = simulation(slowness).run()
        times = {action: sum(1 for _, other in done.due if other == action) for action in ("evaluate", "save", "log")}
        assert 7 <= times["evaluate"] <= 12, name
        assert 7 <= times["save"] <= 12, name
        assert 130 <= times["log"] <= 260, name


def test_limit_of_steps_holds_within_the_time() -> None:
    done = simulation(EARLY["bursts"], max_steps=500).run()
    assert done.step == 500
    assert done.train_s < 180


def test_number_of_steps_is_estimated_from_both_limits() -> None:
    by_time, by_both = TrainerConfig(max_minutes=1), TrainerConfig(max_minutes=1, max_steps=250)
    assert estimate_num_steps(by_time, 100, 30.0, step_s=0.1) == 400
    assert estimate_num_steps(by_both, 100, 30.0, step_s=0.1) == 250
    assert estimate_num_steps(by_both, 100, 30.0, step_s=1.0) == 130
    assert estimate_num_steps(by_time, 100, 90.0, step_s=0.1) == 101  # one more, at least
    assert estimate_num_steps(TrainerConfig(max_steps=7), 100, 30.0, step_s=0.1) == 7


def test_run_without_a_time_limit_is_never_planned_anew() -> None:
    budget = StepBudget(TrainerConfig(max_steps=9), OptimConfig(), 1.0, ((0, 9),))
    assert not any(budget.due(step, 1000.0 * step) for step in range(10))


def test_time_left_follows_the_speed_of_late() -> None:
    budget = StepBudget(TrainerConfig(max_steps=300), OptimConfig(), 1.0, ((0, 300),))
    for step in range(1, 101):
        budget.read(step, 0.1 * step)
    assert budget.left_s == pytest.approx(20)
    for step in range(101, 151):
        budget.read(step, 10 + 0.4 * (step - 100))
    assert budget.left_s == pytest.approx(60)


def test_speed_is_that_of_the_window() -> None:
    speed = Speed(0, 0.0)
    assert speed.step_s(1.0) == 0
    speed.read(10, 10.0)
    speed.read(30, 20.0)
    assert speed.step_s(10.0) == pytest.approx(0.5)
    assert speed.step_s(5.0) == pytest.approx(0.5)
    assert speed.step_s(15.0) == pytest.approx(15 / 25)
    assert speed.step_s(100.0) == pytest.approx(20 / 30)
    speed.forget(10.0)
    assert speed.step_s(10.0) == pytest.approx(0.5)
    assert len(speed.readings) == 2
