"""What a report says of teachers and students in training."""

from __future__ import annotations

import re
from dataclasses import replace

from evaluation_example import example

from kd_recipes.evaluation.report.markdown import to_markdown
from kd_recipes.evaluation.report.page import to_html
from kd_recipes.evaluation.report.training import training_table


def test_what_teachers_make_of_the_text_is_said() -> None:
    evaluation = example()
    table = training_table(evaluation)
    assert table is not None
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        ("distilled", "teacher"),
        ("distilled", "student"),
        ("labels_only", "teacher"),
        ("labels_only", "student"),
    ]
    assert [cell.text for cell in table.rows[0][2:4]] == ["2.900", "3.000"]
    assert table.rows[2][2].text == "–"  # labels alone ask no teacher
    assert training_table(replace(evaluation, runs={})) is None
    assert re.search(r"\| distilled +\| teacher +\| +2\.900 \| +3\.000 \|", to_markdown(evaluation))
    assert table.title in to_html(evaluation)


def test_each_teacher_of_a_mixture_has_a_row_and_does_not_pass_for_the_student() -> None:
    of_teachers = {f"teacher_{name}/{value}": 0.25 for name in ("a", "b.c") for value in ("cross_entropy", "weight")}
    tags = {f"kd/{tag}": value for tag, value in of_teachers.items()}
    steps = [[step, {"loss/cross_entropy": 4.0, "kd/forward_kl": 2.0, **tags}] for step in range(1, 11)]
    held_out = [[10, {"cross_entropy": 5.0, "kl": 2.0, **of_teachers, "teacher_a/kl": 7.0, "teacher_b.c/kl": 8.0}]]
    recorded = {"train": steps, "held_out": held_out, "alerts": [], "config": {}}
    evaluation = replace(example(), runs={"distilled": recorded})
    table = training_table(evaluation)
    assert table is not None
    rows = {row[1].text: [cell.text for cell in row[2:]] for row in table.rows}
    assert rows["a"] == ["0.250", "0.250", "7.000", "25%"]
    assert rows["b.c"] == ["0.250", "0.250", "8.000", "25%"]
    assert rows["student"] == ["4.000", "5.000", "–", "–"]
    html = to_html(evaluation)
    assert "training from 4.000 to 4.000, held-out from 5.000" in html
    assert "training from 2.000 to 2.000, held-out from 2.000" in html
