"""Over-distillation is noticed when it is there, once, and not when it is not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_recipes.errors import ConfigError, within
from kd_recipes.history import History
from kd_recipes.monitoring import Alert, Health, HealthMonitor, Vitals

# A student that is what its teacher is: numbers as 16 prompts and 96 tokens gave for a teacher at temperature 1.
TEACHER = {"calibration_error": 0.03, "distinct_2": 0.944, "repetition_4": 0.011, "self_bleu": 4.4, "entropy": 2.0}
TEACHER |= {"commonest_opening": 0.125, "mean_length": 60.0, "ended_share": 0.75}
WELL = Vitals.of(
    {**TEACHER, "held_out_kl": 0.4, "train_kl": 0.4, "cross_entropy": 2.5, "agreement": 0.8}
    | {"exposure_short": 20.0, "exposure_long": 40.0},
    TEACHER,
)
# name of the alert, what is measured just beyond its limit, just within, and the alert's limit
CASES: list[tuple[str, dict[str, float], dict[str, float], float]] = [
    ("kl_gap", {"train_kl": 0.26}, {"train_kl": 0.27}, 1.5),
    ("kl_gap", {"train_kl": 0.001, "held_out_kl": 0.031}, {"train_kl": 0.001, "held_out_kl": 0.029}, 1.5),
    (
        "teacher_hacking",
        {"cross_entropy": 2.56, "held_out_kl": 0.38},
        {"cross_entropy": 2.54, "held_out_kl": 0.38},
        0.02,
    ),
    (
        "teacher_hacking",
        {"cross_entropy": 2.56, "held_out_kl": 0.38},
        {"cross_entropy": 2.56, "held_out_kl": 0.4},
        0.02,
    ),
    ("agreement", {"agreement": 0.765}, {"agreement": 0.775}, 0.77),
    ("entropy_ratio", {"entropy": 1.39}, {"entropy": 1.41}, 0.7),
    ("entropy_ratio", {"entropy": 3.01}, {"entropy": 2.99}, 1.5),
    ("calibration_error", {"calibration_error": 0.081}, {"calibration_error": 0.079}, 0.08),
    ("distinct_2", {"distinct_2": 0.80}, {"distinct_2": 0.81}, 0.85 * 0.944),
    ("repetition_4", {"repetition_4": 0.101}, {"repetition_4": 0.099}, 0.1),
    (
        "repetition_4",
        {"repetition_4": 0.13, "teacher_repetition_4": 0.06},
        {"repetition_4": 0.11, "teacher_repetition_4": 0.06},
        0.12,
    ),
    ("self_bleu", {"self_bleu": 10.1}, {"self_bleu": 9.9}, 10),
    ("self_bleu", {"self_bleu": 31, "teacher_self_bleu": 20}, {"self_bleu": 29, "teacher_self_bleu": 20}, 30),
    ("commonest_opening", {"commonest_opening": 5 / 16}, {"commonest_opening": 4 / 16}, 0.25),
    (
        "commonest_opening",
        {"commonest_opening": 4 / 16, "teacher_commonest_opening": 1 / 16},
        {"commonest_opening": 3 / 16, "teacher_commonest_opening": 1 / 16},
        0.2,
    ),
    ("mean_length", {"mean_length": 91.0}, {"mean_length": 89.0}, 90),
    ("mean_length", {"mean_length": 29.0}, {"mean_length": 31.0}, 30),
    ("ended_share", {"ended_share": 3 / 16}, {"ended_share": 4 / 16}, 0.75 - 3 * math.sqrt(2 * 7.5 * 8.5) / 64),
    (
        "ended_share",
        {"ended_share": 7 / 16, "teacher_ended_share": 1},
        {"ended_share": 8 / 16, "teacher_ended_share": 1},
        0.5,
    ),
    (
        "ended_share",
        {"ended_share": 16 / 16, "teacher_ended_share": 8 / 16},
        {"ended_share": 15 / 16, "teacher_ended_share": 8 / 16},
        0.5 + 3 * math.sqrt(2 * 12 * 4) / 64,
    ),
    ("exposure_growth", {"exposure_long": 71.0}, {"exposure_long": 69.0}, 50),
]


def _watch(monitor: HealthMonitor, *all_vitals: Vitals) -> Iterator[list[Alert]]:
    """The alerts at each evaluation, every 10 steps."""
    for index, vitals in enumerate(all_vitals):
        yield monitor.observe(10 * index, vitals)


def _fired(*all_vitals: Vitals, **settings: Any) -> list[tuple[int, str]]:
    return [(a.step, a.signal) for alerts in _watch(HealthMonitor(Health(**settings)), *all_vitals) for a in alerts]


# ------------------------------------------------------------------------------------------------------- each symptom
@pytest.mark.parametrize(("name", "beyond", "within_limit", "limit"), CASES)
def test_an_alert_comes_after_persistence_once_and_again_only_after_recovery(
    name: str, beyond: dict[str, float], within_limit: dict[str, float], limit: float
) -> None:
    sick, just_well = replace(WELL, **beyond), replace(WELL, **within_limit)
    monitor = HealthMonitor(Health())
    found = [*_watch(monitor, WELL, sick, just_well, sick, sick, sick, just_well, sick, sick)]
    assert [[alert.signal for alert in alerts] for alerts in found] == [[], [], [], [], [name], [], [], [], [name]]
    alert = found[4][0]
    assert (alert.step, alert.since_step) == (40, 30)
    assert alert.limit == pytest.approx(limit)
    assert alert.value == pytest.approx(monitor.metrics()[name])
    assert alert.message
    assert alert.remedy
    assert "nan" not in str(alert)
    assert not any(brace in str(alert) for brace in "{}")


@pytest.mark.parametrize(("name", "beyond", "within_limit", "limit"), CASES)
def test_a_limit_that_is_null_is_not_watched(
    name: str, beyond: dict[str, float], within_limit: dict[str, float], limit: float
) -> None:
    limits = {field.name: None for field in fields(Health) if field.name.startswith(("max_", "min_"))}
    del limits["max_new_tokens"], limits["min_ended_texts"], limits["max_restores"]  # which are no limits of a signal
    assert _fired(WELL, *[replace(WELL, **beyond)] * 4, **limits) == []


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4), st.data())
def test_persistence_is_a_count_of_evaluations_in_a_row(
    is_beyond: list[bool], persistence: int, data: st.DataObject
) -> None:
    name, beyond, within_limit, _ = data.draw(st.sampled_from(CASES))
    sequence = [WELL, *(replace(WELL, **(beyond if sick else within_limit)) for sick in is_beyond)]
    expected, count = [], 0
    for index, sick in enumerate(is_beyond, 1):
        count = count + 1 if sick else 0
        if count == persistence:
            expected.append((10 * index, name))
    assert _fired(*sequence, persistence=persistence) == expected


@given(st.data())
def test_what_was_not_measured_is_no_alert_and_no_recovery(data: st.DataObject) -> None:
    name, beyond, _, _ = data.draw(st.sampled_from(CASES))
    sick, nothing = replace(WELL, **beyond), Vitals()
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=3, max_size=3))
    sequence = [sick] + [v for gap in gaps for v in [*[nothing] * gap, sick]]
    fired = _fired(WELL, *[nothing] * 3, *sequence)
    assert fired == [(10 * (3 + 1 + gaps[0] + 1), name)]
    assert _fired(*[nothing] * 5) == []


@given(
    st.lists(st.fixed_dictionaries({field.name: st.floats() for field in fields(Vitals)}), min_size=1, max_size=6),
    st.integers(1, 3),
)
def test_any_numbers_and_their_record_give_the_same_alerts(rows: list[dict[str, float]], persistence: int) -> None:
    health = Health(persistence=persistence)
    live = [
        str(alert) for alerts in _watch(HealthMonitor(health), *(Vitals(**row) for row in rows)) for alert in alerts
    ]
    record = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
    replayed = _watch(HealthMonitor(health), *(Vitals.of(values) for values in record))
    assert [str(alert) for alerts in replayed for alert in alerts] == live


@pytest.mark.parametrize("name", [field.name for field in fields(Vitals)])
def test_a_number_that_is_missing_silences_only_what_it_is_part_of(name: str) -> None:
    missing = replace(WELL, **{name: math.nan})
    assert _fired(*[missing] * 4) == []
    sick = {"calibration_error": 0.2} if "agreement" in name else {"agreement": 0.5}
    fired = _fired(missing, *[replace(missing, **sick)] * 2)
    assert fired == [(20, *sick)] or name in sick


# ------------------------------------------------------------------------------------------------------------ messages
def test_teacher_hacking_says_what_was_seen_and_what_to_change() -> None:
    monitor = HealthMonitor(Health())
    best = replace(WELL, held_out_kl=0.41, cross_entropy=2.5)
    assert monitor.observe(100, replace(WELL, held_out_kl=0.6, cross_entropy=2.8)) == []
    assert monitor.observe(120, best) == []
    assert monitor.observe(140, replace(best, held_out_kl=0.39, cross_entropy=2.555)) == []
    (alert,) = monitor.observe(160, replace(best, held_out_kl=0.38, cross_entropy=2.56))
    assert "falls (0.41 -> 0.38) while the loss on human text rose 2.4% above its best, 2.5 at step 120" in str(alert)
    assert "since step 140" in str(alert)
    assert "lower kd_ratio" in alert.remedy
    assert (alert.reference, alert.value) == (2.5, pytest.approx(0.024))


def test_plain_overfitting_is_no_teacher_hacking() -> None:
    worse = replace(WELL, cross_entropy=3.0, held_out_kl=0.9, train_kl=0.8)
    assert _fired(WELL, *[worse] * 4) == []


# ------------------------------------------------------------------------------------------------------- healthy runs
def _texts(noise: random.Random, num_prompts: int = 16) -> dict[str, float]:
    """What the texts of a model like the teacher come to, with the noise of so few of them."""

    def share(p: float) -> float:
        return sum(noise.random() < p for _ in range(num_prompts)) / num_prompts

    openings = [noise.choices(range(40), weights=[4] + [1] * 39)[0] for _ in range(num_prompts)]
    lengths = [min(96, noise.lognormvariate(3.9, 0.6)) for _ in range(num_prompts)]
    return {
        "distinct_2": noise.gauss(0.944, 0.01),
        "repetition_4": max(0, noise.gauss(0.011, 0.008)),
        "self_bleu": max(0, noise.gauss(4.4, 1.0)),
        "commonest_opening": max(map(openings.count, openings)) / num_prompts,
        "mean_length": sum(lengths) / num_prompts,
        "ended_share": share(0.75),
    }


def _run(noise: random.Random, start: float, num_evaluations: int = 12) -> list[Vitals]:
    """A student that comes from ``start`` times too far off to its teacher and stays there."""
    teacher = {**_texts(noise), "entropy": 2.0, "calibration_error": 0.03}
    run = []
    for index in range(num_evaluations):
        off = start * math.exp(-index / 2)
        texts = _texts(noise)
        texts["repetition_4"] += 0.2 * off
        texts["distinct_2"] -= 0.2 * off
        texts["self_bleu"] += 10 * off
        kl = 0.4 + 1.5 * off
        student = {
            **texts,
            "held_out_kl": kl * noise.gauss(1, 0.01),
            "train_kl": 1.1 * kl * noise.gauss(1, 0.05),
            "cross_entropy": 2.5 * (1 + 0.3 * off) * noise.gauss(1, 0.003),
            "agreement": 0.8 - 0.3 * off + noise.gauss(0, 0.004),
            "entropy": 2.0 * (1 + 0.8 * off) * noise.gauss(1, 0.02),
            "calibration_error": 0.04 + 0.1 * off + abs(noise.gauss(0, 0.005)),
            "exposure_short": (short := noise.gauss(20, 10)),
            "exposure_long": short + noise.gauss(20, 10),
        }
        run.append(Vitals.of(student, teacher))
    return run


@pytest.mark.parametrize("start", [0.0, 1.0, 3.0], ids=["as the teacher", "pruned", "broken"])
def test_healthy_runs_are_left_in_peace(start: float) -> None:
    runs = [_run(random.Random(seed), start) for seed in range(200)]
    fired = [alert for run in runs for alert in _fired(*run)]
    print(f"\n{len(fired)} alerts in {len(runs)} runs of {len(runs[0])} evaluations: {fired}")
    assert fired == []


def test_a_student_that_begins_beyond_a_limit_is_watched_once_it_comes_no_nearer() -> None:
    on_its_way = [replace(WELL, repetition_4=share) for share in (0.6, 0.5, 0.3, 0.2)]
    assert _fired(*on_its_way) == []
    assert _fired(*on_its_way, *on_its_way[:-3:-1]) == [(50, "repetition_4")]  # back from where it had come to
    stuck = [replace(WELL, repetition_4=share) for share in (0.6, 0.5, 0.55, 0.5, 0.4, 0.45, 0.5, 0.01, 0.2, 0.2)]
    assert _fired(*stuck) == [(30, "repetition_4"), (90, "repetition_4")]


# -------------------------------------------------------------------------------------------------- state and settings
def test_a_monitor_is_made_again_from_the_history(tmp_path: Path) -> None:
    sick = replace(WELL, repetition_4=0.3, agreement=math.nan)
    history, monitor = History(tmp_path), HealthMonitor(Health(action="anneal_kd_ratio"))
    history.append(0, "held_out", {"kl": 1.0})
    for alerts, (step, vitals) in zip(
        _watch(monitor, WELL, sick, sick, WELL, sick), enumerate([WELL, sick, sick, WELL, sick]), strict=True
    ):
        history.append(10 * step, "health", asdict(vitals))
        for alert in alerts:
            history.append(10 * step, "alert", asdict(alert))
    again = HealthMonitor(Health(action="anneal_kd_ratio"))
    recorded = [Alert(**entry.values) for entry in history.read("alert")]
    assert again.replay(history.read()) == recorded
    assert [alert.signal for alert in recorded] == ["repetition_4"]
    assert again.adjust({"kd_ratio": 0.8, "temperature": 2.0}) == {"kd_ratio": 0.4, "temperature": 2.0}
    assert again.observe(50, sick) == monitor.observe(50, sick) != []
    assert {k: v for k, v in again.metrics().items() if v == v} == {
        k: v for k, v in monitor.metrics().items() if v == v
    }
    json.dumps([asdict(alert) for alert in recorded])


def test_what_an_action_does_to_the_objective() -> None:
    settings = {"kd_ratio": 0.8, "temperature": 2.0}
    sick = replace(WELL, repetition_4=0.3, distinct_2=0.5)  # two alerts at one evaluation are one reason to act
    expected: dict[str, tuple[float, float]] = {"anneal_kd_ratio": (0.4, 2.0), "raise_temperature": (0.8, 3.0)}
    actions: list[Any] = ["warn", "stop", "restore_best", "anneal_kd_ratio", "raise_temperature"]
    for action in actions:
        monitor = HealthMonitor(Health(action=action))
        assert monitor.adjust(settings) == settings
        assert sum(map(len, _watch(monitor, WELL, sick, sick))) == 2
        assert tuple(monitor.adjust(settings).values()) == expected.get(action, (0.8, 2.0))
    assert HealthMonitor(Health()).metrics() == {}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("persistence", 0, "a whole number above 0"),
        ("persistence", True, "a whole number above 0"),
        ("num_prompts", 2.5, "a whole number above 0"),
        ("action", "panic", "one of warn, stop, restore_best, anneal_kd_ratio, raise_temperature"),
        ("max_kl_gap", -1, "a number above 0"),
        ("max_kl_gap", math.nan, "a number above 0"),
        ("kl_floor", None, "a number above 0"),
        ("min_distinct_2", 1.5, "a number above 0 and below 1"),
        ("temperature_factor", 0.9, "a number above 1"),
        ("temperature_factor", "high", "a number above 1"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: object, wanted: str) -> None:
    build: Callable[[], Health] = lambda: Health(**{name: value})  # noqa: E731
    with pytest.raises(ConfigError, match=wanted) as caught:
        within("health", build)
    assert [problem.key for problem in caught.value.problems] == [f"health.{name}"]


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Health(persistence=0, max_self_bleu=0.0, action="nothing")  # type: ignore[arg-type]
    assert {problem.key for problem in caught.value.problems} == {".persistence", ".max_self_bleu", ".action"}
