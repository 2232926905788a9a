"""The one line that says where the whole pipeline is."""

from __future__ import annotations

from kd_recipes.pipelining.progress import overview

NAMES = ["teacher", "pruned", "distilled", "evaluation", "exported"]


def test_each_step_is_named_with_its_state_and_minutes() -> None:
    states = {"teacher": "unchanged", "pruned": "done", "distilled": "running"}
    assert overview(NAMES, states, {"teacher": 6.0, "pruned": 90.0, "distilled": 3600.0}) == (
        "pipeline: 2 of 5 steps 61.6 min | teacher unchanged 0.1 min | pruned done 1.5 min | distilled running 60.0 min"
        " | to come: evaluation, exported"
    )


def test_the_first_and_the_last() -> None:
    assert (
        overview(NAMES[:2], {"teacher": "running"}, {}) == "pipeline: 0 of 2 steps | teacher running | to come: pruned"
    )
    states = {"teacher": "done", "pruned": "running"}
    assert overview(NAMES[:2], states, {}) == "pipeline: 1 of 2 steps | teacher done | pruned running"
