"""What follows from the number of steps: the learning rate stays continuous and actions keep their times."""

import itertools

import pytest

from minitf.optim import OptimConfig, schedule_factor
from minitf.training.plan import Interval, LearningRate, Schedule
from minitf.training.trainer_config import TrainerConfig

CURVES = {
    "wsd": OptimConfig(schedule="wsd", warmup_fraction=0.1),
    "cosine": OptimConfig(schedule="cosine", warmup_fraction=0.1, final_fraction=0.1),
    "constant": OptimConfig(schedule="constant", warmup_fraction=0.1),
}


def factors(config: OptimConfig, plans: list[tuple[int, int]]) -> list[float]:
    """The rate of every step of a run with these plans."""
    (_, num_steps), *moves = plans
    rate, found = LearningRate.of(config, num_steps), []
    for step in itertools.count(1):
        found.append(rate.factor(step))
        if moves and moves[0][0] == step:
            rate = rate.moved(*moves.pop(0))
        if step == rate.num_steps:
            return found
    raise AssertionError


@pytest.mark.parametrize("schedule", CURVES)
def test_rate_of_a_run_with_one_plan_is_the_schedule_bit_for_bit(schedule: str) -> None:
    for num_steps in (1, 2, 9, 1234):
        expected = [schedule_factor(CURVES[schedule], step, num_steps) for step in range(1, num_steps + 1)]
        assert factors(CURVES[schedule], [(0, num_steps)]) == expected


@pytest.mark.parametrize("schedule", CURVES)
def test_plans_that_change_nothing_leave_the_rate(schedule: str) -> None:
    plans = [(0, 100), *((step, 100) for step in (1, 7, 10, 11, 30, 60, 61, 75, 99))]
    assert factors(CURVES[schedule], plans) == pytest.approx(factors(CURVES[schedule], [(0, 100)]), abs=1e-12)


@pytest.mark.parametrize("schedule", CURVES)
@pytest.mark.parametrize("num_steps", [520, 700, 1000, 1500, 4000])
@pytest.mark.parametrize("step", [3, 50, 99, 100, 300, 500])
def test_rate_never_jumps_and_ends_with_the_run(schedule: str, num_steps: int, step: int) -> None:
    config = CURVES[schedule]
    found = factors(config, [(0, 1000), (step, num_steps)])
    assert len(found) == num_steps
    assert min(found) > 0
    assert max(found) <= 1
    if num_steps - step > 100:
        assert max(abs(a - b) for a, b in itertools.pairwise(found)) < 0.025
    if schedule != "constant":
        assert found[-1] < config.final_fraction + 0.06


def test_rate_that_does_not_fall_yet_forgets_earlier_plans() -> None:
    wsd = CURVES["wsd"]
    for step in (250, 400, 590):
        found, known = factors(wsd, [(0, 1000), (step, 2000)]), factors(wsd, [(0, 2000)])
        assert found[200:] == pytest.approx(known[200:], abs=1e-9)


def test_rate_that_should_fall_already_begins_to() -> None:
    found = factors(CURVES["wsd"], [(0, 1000), (550, 650)])
    assert found[100:550] == [1.0] * 450
    assert found[550:] == pytest.approx([1 - number / 101 for number in range(1, 101)])


def test_share_of_the_decay_is_known() -> None:
    rate = LearningRate.of(CURVES["wsd"], 1000)
    assert rate.falling_share == pytest.approx(0.4)
    assert rate.moved(300, 2000).falling_share == pytest.approx(0.4)
    assert rate.moved(550, 650).falling_share == pytest.approx(100 / 650, abs=2e-3)
    assert rate.moved(700, 800).falling_share == pytest.approx(200 / 800, abs=2e-3)
    assert rate.moved(700, 800).moved(750, 1200).falling_share == pytest.approx(600 / 1200, abs=2e-3)
    assert rate.moved(550, 650).moved(560, 1200).falling_share == pytest.approx(0.4, abs=2e-3)


def test_rate_that_fell_too_early_waits_until_it_should() -> None:
    found = factors(CURVES["wsd"], [(0, 1000), (550, 650), (560, 1200)])
    assert found[100:550] == [1.0] * 450
    reached = found[559]
    assert 0.88 < reached < 0.92
    assert found[560:719] == pytest.approx([reached] * 159, abs=1e-12)
    assert found[720:] == pytest.approx([reached * left / 480 for left in range(480, 0, -1)], abs=1e-3)


def test_actions_are_due_at_multiples_of_their_interval_and_as_often_after_a_move() -> None:
    config = TrainerConfig(max_minutes=1, log_every=7)
    schedule = Schedule.of(config, 100, 0.0)
    assert [step for step in range(1, 101) if schedule.evaluate.includes(step)] == [13, 26, 39, 52, 65, 78, 91]
    moved = schedule.moved(40, config, 200, 0.0)
    found = [step for step in range(40, 201) if moved.evaluate.includes(step)]
    assert found == [66, 93, 120, 147, 174]  # and at the last step
    assert [step for step in range(40, 70) if moved.log.includes(step)] == [42, 49, 56, 63]  # set, and kept
    shorter = moved.moved(150, config, 190, 0.0)
    assert [step for step in range(150, 191) if shorter.evaluate.includes(step)] == [169]


@pytest.mark.parametrize("moves", [[(5, 8)], [(5, 50)], [(5, 8), (7, 9), (8, 30)]])
def test_times_of_an_interval_are_never_closer_than_the_interval(moves: list[tuple[int, int]]) -> None:
    interval, last = Interval(4), 0
    for step in range(1, 60):
        for at, steps in moves:
            if at == step:
                assert interval.last_before(step) == last
                interval = Interval(steps, interval.last_before(step), step)
        if interval.includes(step):
            assert step - last >= interval.steps
            last = step
