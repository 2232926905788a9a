from __future__ import annotations

import math
from dataclasses import replace

import pytest
from evaluation_example import SPECS, UNKNOWN, example, run, text

from kd_recipes.evaluation.measure import change
from kd_recipes.evaluation.report.verdict import verdict
from kd_recipes.evaluation.results import Evaluation, ModelResult


def with_bits(evaluation: Evaluation, **bits: float) -> Evaluation:
    """The same, of which some models have other bits a byte, or are left out where that is nan."""
    teacher = evaluation.models[0].text
    models = []
    for model in evaluation.models:
        found = bits.get(model.name)
        if found is not None and math.isnan(found):
            continue
        if found is not None:
            figures = text(replace(SPECS[model.name], bits=found), model.name)
            model = replace(model, text=replace(figures, change=change(figures, teacher)))
        models.append(model)
    return replace(evaluation, models=models, runs={m.name: r for m in models if (r := evaluation.runs.get(m.name))})


def test_verdict_of_a_better_and_smaller_model() -> None:
    first, *rest = (" ".join(sentence.split()) for sentence in verdict(example()))
    assert first == (
        "int4 reaches 101% of teacher's token accuracy at 33% of its size and is 1.2× as fast; "
        "bits per byte −0.019 ± 0.004, better than teacher."
    )
    assert rest == [
        "distilled keeps 80% of teacher's token accuracy at 74% of its size and is 1.4× as fast; "
        "bits per byte +0.204 ± 0.007.",
        "labels_only, trained on labels alone, is at +0.211 ± 0.008 bits per byte: the teacher has made distilled "
        "better by 0.007 ± 0.004.",
        "On 2 tasks int4 shows no difference.",
        "Of 2 tasks, distilled is worse on social_iqa (p < 0.05); on the other no difference shows.",
    ]


def test_verdict_of_no_difference() -> None:
    first = verdict(with_bits(example(), int4=0.8795))[0]
    assert "; no difference in bits per byte that the text shows (+0.00" in first


@pytest.mark.parametrize(
    ("distilled", "labels", "said"),
    [
        (1.083, 1.100, "the teacher has made distilled better by 0.017"),
        (1.083, 1.084, "no difference from distilled that the text shows (+0.001"),
        (1.083, 1.060, "better than distilled by 0.023"),
    ],
    ids=["helps", "not shown", "hurts"],
)
def test_verdict_on_the_teacher(distilled: float, labels: float, said: str) -> None:
    evaluation = with_bits(example(), distilled=distilled, labels_only=labels, int4=math.nan)
    sentences = [" ".join(sentence.split()) for sentence in verdict(evaluation)]
    assert any("labels_only, trained on labels alone" in sentence and said in sentence for sentence in sentences)
    leader = "distilled" if distilled < labels else "labels_only"
    assert sentences[0].startswith(f"{leader} keeps ")


def test_verdict_says_when_budgets_differ() -> None:
    evaluation = example()
    longer = run(0.0, (4.6, 3.43), (1.95, 1.25))
    longer["train"] = [[2 * step, values] for step, values in longer["train"]]
    sentences = verdict(replace(evaluation, runs={**evaluation.runs, "labels_only": longer}))
    assert "after 60 steps (distilled: 30)" in " ".join(sentences)


def test_verdict_of_labels_alone() -> None:
    evaluation = with_bits(example(), int4=math.nan, distilled=math.nan)
    sentences = verdict(evaluation)
    assert sentences[0].startswith("labels_only keeps 79%")
    assert "trained on labels alone" in sentences[1]
    assert "distilled" not in " ".join(sentences)


def test_verdict_of_one_model() -> None:
    evaluation = replace(example(), models=example().models[:1], runs={})
    assert " ".join(verdict(evaluation)[0].split()) == (
        "teacher has 0.879 ± 0.029 bits per byte, 43.6 ± 1.2% of tokens right, at 269 MB."
    )


def test_verdict_without_speed_or_size() -> None:
    evaluation = with_bits(example(), int4=math.nan, labels_only=math.nan, pruned=math.nan)
    teacher, distilled = evaluation.models
    slow = replace(distilled.cost, decode_tokens_per_second=math.nan)
    same = replace(slow, num_bytes=teacher.cost.num_bytes)

    def first(model: ModelResult) -> str:
        return verdict(replace(evaluation, models=[teacher, model]))[0]

    assert first(replace(distilled, cost=slow)).startswith(
        "distilled keeps 80% of teacher's token accuracy at 74% of its size; "
    )
    assert " at the same size; " in first(replace(distilled, cost=same))
    unknown = replace(distilled, cost=slow, text=replace(distilled.text, accuracy=UNKNOWN))
    assert first(unknown).startswith("distilled has 74% of teacher's size; bits per byte +0.204")
