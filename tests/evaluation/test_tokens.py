"""Each token's numbers against the textbook in float64, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.evaluation import evaluate_held_out, tokens
from kd_recipes.evaluation.measure import change, measure_text
from kd_recipes.evaluation.results import TextFigures
from kd_recipes.signals import DenseSignal, Exact, LinearLogits, MixtureSignal, SparseSignal

B, S, V = 3, 7, 11


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels_BS = torch.randint(0, V, (B, S), generator=generator)
    labels_BS[0, :3] = labels_BS[2, 1:] = IGNORE_INDEX
    return Batch(torch.randint(0, V, (B, S), generator=generator), labels_BS)


def logits(seed: int, num_rows: int = V) -> Tensor:
    return 3 * torch.randn(B * S, num_rows, generator=torch.Generator().manual_seed(seed))


def signal(values_TV: Tensor) -> DenseSignal:
    return DenseSignal(LinearLogits(given_TV=values_TV))


def oracle(q_TV: Tensor, p_TV: Tensor, batch: Batch) -> list[dict[str, float]]:
    """One token at a time, by the definitions."""
    rows = []
    for place, label in enumerate(batch.labels_BS.flatten().tolist()):
        if label == IGNORE_INDEX:
            continue
        q, p = (x_TV[place].double().softmax(0).tolist() for x_TV in (q_TV, p_TV))
        rows.append(
            {
                "row": place // S,
                "cross_entropy": -math.log(q[label]),
                "entropy": -sum(a * math.log(a) for a in q),
                "accuracy": float(q.index(max(q)) == label),
                "confidence": max(q),
                "kl": sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)),
                "reverse_kl": sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)),
                "agreement": float(q.index(max(q)) == p.index(max(p))),
                "reference_cross_entropy": -math.log(p[label]),
                "reference_entropy": -sum(b * math.log(b) for b in p),
            }
        )
    return rows


@pytest.mark.parametrize("chunk", [1, 4, 2**24])
def test_each_token_is_what_the_definitions_say(batch: Batch, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_LOGITS", chunk * V)
    # a padded head of the reference: what is beyond the shared ids counts nothing
    q_TV, p_TV = logits(2), logits(3, V + 5)
    found = tokens.token_values(signal(q_TV), signal(p_TV), batch, num_ids=V)
    expected = oracle(q_TV, p_TV[:, :V], batch)
    assert found.rows_N.tolist() == [row["row"] for row in expected]
    for name in expected[0].keys() - {"row"}:
        assert found.values[name].tolist() == pytest.approx([row[name] for row in expected], rel=1e-5, abs=1e-6), name


def test_an_id_without_probability_is_no_nan(batch: Batch) -> None:
    q_TV, p_TV = logits(2), logits(3)
    p_TV[:, 4] = -torch.inf
    found = tokens.token_values(signal(q_TV), signal(p_TV), batch, num_ids=V)
    assert found.values["kl"].isfinite().all()
    assert (found.values["reverse_kl"] == torch.inf).all()  # the model gives it some


def means(q_TV: Tensor, p_TV: Tensor, batch: Batch) -> dict[str, float]:
    rows = oracle(q_TV, p_TV, batch)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def test_held_out_means_are_over_the_tokens_of_all_batches(batch: Batch) -> None:
    q_TV, p_TV = logits(2), logits(3)
    found = evaluate_held_out(lambda _: signal(q_TV), lambda _: signal(p_TV), [batch, batch], V)
    expected = means(q_TV, p_TV, batch)
    assert found.num_tokens == 2 * len(oracle(q_TV, p_TV, batch))
    assert found.kl == pytest.approx(expected["kl"], rel=1e-5)
    assert found.student_entropy == pytest.approx(expected["entropy"], rel=1e-5)
    assert found.teacher_cross_entropy == pytest.approx(expected["reference_cross_entropy"], rel=1e-5)
    alone = evaluate_held_out(lambda _: signal(q_TV), None, [batch], V)
    assert alone.cross_entropy == pytest.approx(expected["cross_entropy"], rel=1e-5)
    assert math.isnan(alone.kl)
    assert math.isnan(alone.teacher_calibration_error)


def test_sums_of_two_processes_give_what_one_gives(batch: Batch) -> None:
    other = Batch(batch.tokens_BS.flip(0), batch.labels_BS.flip(0))
    q_TV, p_TV = logits(2), logits(3)
    both: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        both.append(sums)
        return sums

    arguments = (lambda _: signal(q_TV), lambda _: signal(p_TV))
    whole = evaluate_held_out(*arguments, [batch, other], V)
    for part in (batch, other):
        evaluate_held_out(*arguments, [part], V, collect)
    split = evaluate_held_out(*arguments, [batch], V, lambda _: both[0] + both[1])
    assert split.metrics() == pytest.approx(whole.metrics())


def test_text_figures_are_ratios_over_sequences(batch: Batch) -> None:
    q_TV, p_TV = logits(2), logits(3)

    def measure(values_TV: Tensor) -> TextFigures:
        return measure_text(
            lambda *_: signal(values_TV),
            lambda *_: signal(p_TV),
            [(0, batch), (1, batch)],
            num_ids=V,
            count_bytes=lambda ids: 3 * len(ids),
        )

    found, same = measure(q_TV), measure(p_TV)
    expected = means(q_TV, p_TV, batch)
    assert found.bits_per_byte.mean == pytest.approx(expected["cross_entropy"] / math.log(2) / 3, rel=1e-5)
    assert found.kl.mean == pytest.approx(expected["kl"], rel=1e-5)
    assert same.kl.mean == pytest.approx(0, abs=1e-6)
    assert same.agreement.mean == 1
    assert found.by_sequence["num_tokens"] == [4, 7, 1] * 2
    less = change(same, found)
    assert less.mean == pytest.approx(same.bits_per_byte.mean - found.bits_per_byte.mean, rel=1e-6)
    assert less.low < less.mean < less.high


def _sparse(p_TV: Tensor, batch: Batch, k: int, temperature: float = 1.0) -> SparseSignal:
    log_p_TV, labels_T = p_TV.log_softmax(-1), batch.labels_BS.flatten().clamp_min(0)
    return replace(SparseSignal.top_k(p_TV, k, temperature), unsoftened=Exact.of(log_p_TV, labels_T))


@pytest.mark.parametrize("k", [3, V])
def test_a_sparse_reference_is_compared_over_its_buckets_and_known_exactly(batch: Batch, k: int) -> None:
    q_TV, p_TV = logits(2), logits(3)
    dense = tokens.token_values(signal(q_TV), signal(p_TV), batch, num_ids=V).values
    found = tokens.token_values(signal(q_TV), _sparse(p_TV, batch, k), batch, num_ids=V).values
    assert found.keys() == dense.keys()
    for name in dense:
        if k == V or "kl" not in name:
            torch.testing.assert_close(found[name], dense[name], msg=name)
        else:  # what is lumped together is told apart less
            assert (found[name] <= dense[name] + 1e-6).all()


def test_a_softened_sparse_reference_is_compared_at_its_temperature(batch: Batch) -> None:
    q_TV, p_TV = logits(2), logits(3)
    softened = tokens.token_values(signal(q_TV / 2), signal(p_TV / 2), batch, num_ids=V).values
    plain = tokens.token_values(signal(q_TV), signal(p_TV), batch, num_ids=V).values
    found = tokens.token_values(signal(q_TV), _sparse(p_TV, batch, V, temperature=2.0), batch, num_ids=V).values
    for name in plain:
        torch.testing.assert_close(found[name], (softened if "kl" in name else plain)[name], msg=name)


def test_of_ids_that_were_drawn_the_divergences_are_estimates(batch: Batch) -> None:
    q_TV, p_TV = logits(2), logits(3)
    ids_TK = torch.arange(V).expand(B * S, V)  # drawn so often that each got its share
    log_p_TV = p_TV.log_softmax(-1)
    drawn = SparseSignal(ids_TK, log_p_TV, torch.full((B * S,), -torch.inf), weights_TK=log_p_TV.exp())
    dense = tokens.token_values(signal(q_TV), signal(p_TV), batch, num_ids=V).values
    found = tokens.token_values(signal(q_TV), drawn, batch, num_ids=V).values
    for name in ("kl", "reverse_kl", "agreement", "reference_accuracy"):
        torch.testing.assert_close(found[name], dense[name], rtol=1e-4, atol=1e-5, msg=name)
    assert found["reference_entropy"].isnan().all()  # nobody has said it


@pytest.mark.parametrize("by_likelihood", [False, True])
@pytest.mark.parametrize("chunk", [4, 2**24])
def test_a_mixture_is_compared_as_one_and_each_teacher_by_itself(
    batch: Batch, by_likelihood: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_LOGITS", chunk * V)
    q_TV, first_TV, second_TV = logits(2), logits(3, V + 5), logits(4)
    weights_TM = torch.tensor([[0.75, 0.25]]).expand(B * S, 2)
    logits_of = {"a": LinearLogits(given_TV=first_TV), "b": LinearLogits(given_TV=second_TV)}
    mixture = MixtureSignal(logits_of, weights_TM.log(), by_likelihood)
    found = tokens.token_values(signal(q_TV), mixture, batch, num_ids=V).values
    p_MTV = torch.stack([first_TV[:, :V], second_TV]).double().softmax(-1)
    labels_T = batch.labels_BS.flatten().clamp_min(0)
    share_MT = weights_TM.T.double()
    blind = oracle(q_TV, (share_MT[..., None] * p_MTV).sum(0).log(), batch)
    if by_likelihood:
        share_MT = share_MT * p_MTV.gather(2, labels_T.expand(2, -1)[..., None])[..., 0]
        share_MT = share_MT / share_MT.sum(0)
    mixed = oracle(q_TV, (share_MT[..., None] * p_MTV).sum(0).log(), batch)
    for name in ("reference_cross_entropy", "reference_entropy"):  # of what has not seen the label
        assert found[name].tolist() == pytest.approx([row[name] for row in blind], rel=1e-5, abs=1e-6), name
    for name in ("kl", "reverse_kl", "agreement", "cross_entropy"):
        assert found[name].tolist() == pytest.approx([row[name] for row in mixed], rel=1e-5, abs=1e-6), name
    is_valid_T = batch.labels_BS.flatten() != IGNORE_INDEX
    for name, p_TV, share_T in zip("ab", p_MTV, share_MT, strict=True):
        alone = oracle(q_TV, p_TV.log(), batch)
        assert found[f"teacher_{name}/kl"].tolist() == pytest.approx([row["kl"] for row in alone], rel=1e-5, abs=1e-6)
        expected = [row["reference_cross_entropy"] for row in alone]
        assert found[f"teacher_{name}/cross_entropy"].tolist() == pytest.approx(expected, rel=1e-5)
        assert found[f"teacher_{name}/weight"].tolist() == pytest.approx(share_T[is_valid_T].tolist(), rel=1e-5)
    whole = evaluate_held_out(lambda _: signal(q_TV), lambda _: mixture, [batch, batch], V)
    assert whole.metrics()["teacher_a/kl"] == pytest.approx(float(found["teacher_a/kl"].mean()), rel=1e-5)
    assert whole.kl == pytest.approx(float(found["kl"].mean()), rel=1e-5)


def test_a_position_of_which_nothing_is_named_is_no_distance_away(batch: Batch) -> None:
    nothing_TK = torch.full((B * S, 3), -torch.inf)
    silent = SparseSignal(torch.zeros(B * S, 3, dtype=torch.long), nothing_TK, torch.zeros(B * S))
    found = tokens.token_values(signal(logits(2)), silent, batch, num_ids=V).values
    for name in ("kl", "reverse_kl"):
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]))
