"""Values that change from step to step."""

import pytest

from kd_recipes.training.schedules import Schedule, is_schedule


def test_a_number_is_constant():
    assert [Schedule.of(0.3).at(step, 10) for step in (0, 5, 99)] == [0.3, 0.3, 0.3]


def test_linear_reaches_its_ends_and_stays():
    schedule = Schedule.of({"start": 1.0, "end": 0.5, "num_steps": 6})
    assert [schedule.at(step, 100) for step in range(8)] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5])


def test_cosine_takes_the_whole_run_and_begins_and_ends_slowly():
    schedule = Schedule.of({"start": 1.0, "end": 3.0, "shape": "cosine"})
    values = [schedule.at(step, 5) for step in range(5)]
    assert values == pytest.approx([1.0, 1.292893, 2.0, 2.707107, 3.0])
    assert schedule.largest == 3.0


def test_a_run_of_one_step_has_the_start():
    assert Schedule.of({"start": 1.0, "end": 0.0}).at(0, 1) == 1.0


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (0.5, True),
        (2, False),
        ({"start": 0.0, "end": 1.0}, True),
        ({"start": 0.0, "end": 1.0, "shape": "cosine", "num_steps": 3}, True),
        ({"start": 0.0}, False),
        ({"start": 0.0, "end": 1.5}, False),
        ({"start": "0", "end": 1.0}, False),
        ({"start": 0.0, "end": 1.0, "shape": "square"}, False),
        ({"start": 0.0, "end": 1.0, "num_steps": 0}, False),
        ({"start": 0.0, "end": 1.0, "steps": 5}, False),
    ],
)
def test_what_a_schedule_may_be(value, valid):
    assert is_schedule(value, lambda number: 0 <= number <= 1) is valid
