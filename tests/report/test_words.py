"""Every text about a loss has the words of the metric: a fraction of the output energy, or nats of the model."""

import pytest
from drawn_study import CHAIN, PREDICT_ZERO, make_study, texts
from study_rows import make_row

from ks.bounds.rank_floors import TargetRanks
from ks.moments.metric import LossMetric
from ks.report.answer import Facts, answer, target_note
from ks.report.figures.draw import study_figures
from ks.report.sentences import advice
from ks.report.verdict import Limit
from ks.report.words import Words, significant

NATS = Words(LossMetric.MODEL_LOSS, "nats", 0.5)
MODEL_LOSS = {"loss_metric": "model_loss", "loss_unit": "nats", "predict_zero_loss": 0.5}


def row_of(**changes):
    """A rank that loses 2% of what the zero predictor loses; the best known chain loses 1%, or between 1% and 1.5%."""
    return make_row(0.02, 0.02, 0.01, rank=4) | {"loss_increase": 0.01, "energy_loss": 0.006} | changes


def test_words_come_from_a_row_and_those_of_earlier_versions_are_about_energy():
    assert Words.of(MODEL_LOSS) == NATS
    assert Words.of({"rank": 2, "predict_zero_loss": None}) == Words()


@pytest.mark.parametrize(
    ("unit", "amount", "whole", "label", "both"),
    [
        ("nats", "0.01 nats", "0.01 nats per token", "(nats per token)", "0.01 nats per token (perplexity × 1.01)"),
        ("squared change", "0.01", "0.01 per token", "(per token)", "0.01 per token (squared change)"),
        ("", "0.01", "0.01 per token", "(per token)", "0.01 per token"),
    ],
)
def test_a_unit_of_several_words_is_no_part_of_a_number_and_only_nats_have_a_perplexity(
    unit, amount, whole, label, both
):
    words = Words(LossMetric.MODEL_LOSS, unit, 0.5)
    assert words.amounts(0.02) == [amount]
    assert words.show(0.02) == whole
    assert words.label == f"loss increase {label}"
    assert words.both_metrics(row_of()) == [
        f"Rank 4 is predicted to cost the model about {both}; it loses 0.60% of the output energy."
    ]


def test_without_gradients_nothing_is_said_about_the_model():
    assert Words().both_metrics(make_row()) == []


@pytest.mark.parametrize(
    ("changes", "target", "first"),
    [
        ({}, 0.02, "Rank 4 is the smallest trained rank that {loses} at most {target}: it {loses} {loss}, with "),
        ({}, 0.015, "{target} is not reached: rank 4 ends at {loss}, its floor is {floor}"),
        (
            {"loss_floor_is_exact": False},
            0.015,
            "{target} is not reached: rank 4 ends at {loss}, the best known chain {loses} ",
        ),
        ({"relative_floor_upper": None}, 0.015, "{target} is not reached: rank 4 ends at {loss}; try a larger rank."),
        ({}, None, "Rank 4 {loses} least: it {loses} {whole}, with "),
        ({"relative_loss": 1e-9}, None, "Rank 4 is the smallest trained rank that {loses} nothing: it has "),
        ({"relative_loss": None}, None, "The criterion is not the mean squared error, so {quantity} is not known: "),
    ],
)
def test_the_first_sentence_has_the_words_of_the_metric(changes, target, first):
    found = None if target is None else TargetRanks(target, 4, 4, target, True)
    for added, filled in (
        (
            {},
            {"loses": "loses", "loss": "2%", "whole": "2% of the output energy", "floor": "1%"}
            | {"target": "2% of the output energy" if target == 0.02 else "1.50% of the output energy"}
            | {"quantity": "the fraction of the output energy lost"},
        ),
        (
            MODEL_LOSS,
            {"loses": "costs", "loss": "0.01 nats", "whole": "0.01 nats per token", "floor": "0.005 nats"}
            | {"target": "0.01 nats per token" if target == 0.02 else "0.0075 nats per token"}
            | {"quantity": "the increase of the loss of the model"},
        ),
    ):
        lines = answer([row_of(**changes, **added)], Facts(target=found), target)
        assert lines[0].startswith(first.format(**filled))
        if changes.get("relative_loss", 1) is not None:
            both = "Rank 4 is predicted to cost the model about 0.01 "
            assert sum(line.startswith(both) for line in lines) == 1


def test_the_other_sentences_of_an_answer_have_them_too():
    row = row_of(
        loss_floor_is_exact=False, relative_floor_upper=0.015, held_out_relative_loss=0.04, final_val_loss=0.015
    )
    facts = Facts({4: (9, 0.011)})
    energy, nats = (answer([row | added], facts, 0.025) for added in ({}, MODEL_LOSS))
    for line in (
        "No chain of rank 4 loses less than 1%; the best known one loses 1.50%.",
        "A low-rank factorisation of the same size (rank 9) gets down to 1.10%, against 2% here; sweep --chain "
        "lowrank as well.",
        "WARNING: on held-out inputs, rank 4 loses 4%, more than 2.50%.",
    ):
        assert line in energy
    for line in (
        "No chain of rank 4 costs less than 0.005 nats; the best known one costs 0.0075 nats.",
        "A low-rank factorisation of the same size (rank 9) gets down to 0.0055 nats, against 0.01 nats here; sweep "
        "--chain lowrank as well.",
        "WARNING: on held-out inputs, rank 4 costs 0.015 nats, more than 0.0125 nats.",
    ):
        assert line in nats
    assert not any("%" in line for line in nats if "parameters" not in line and "output energy" not in line)
    assert any(
        "choose with --target_loss_increase" in line
        for line in answer([row_of(**MODEL_LOSS), row_of(**MODEL_LOSS)], Facts())
    )


def test_advice_and_the_note_on_a_target_have_them():
    row = make_row(0.0105, 0.0105, 0.01, rank=4)
    assert advice([row])[0] == (
        "Rank 4 is within 0.1% of the energy: its loss exceeds the floor by 0.05% of the output energy. A larger "
        "--num_epochs gains little."
    )
    verdict = type(row["verdict"])(Limit.SMALL_INCREASE, False, False, calibration_limited=True)
    changed = row | MODEL_LOSS | {"verdict": verdict, "held_out_relative_loss": 0.04, "final_val_loss": 0.015}
    assert advice([changed])[:2] == [
        "Rank 4 is within 0.1% of the zero predictor's loss: its loss exceeds the floor by 0.00025 nats per token. A "
        "larger --num_epochs gains little.",
        "Rank 4 is calibration-limited: it costs 0.015 nats on held-out inputs, 0.00525 nats on the measured ones. "
        "Measure more inputs.",
    ]
    found = TargetRanks(0.02, 4, 4, 0.01, True)
    assert target_note(found, False, NATS).startswith("target 0.01 nats per token, for the measured inputs: rank 4 is ")


def test_figures_of_the_loss_of_the_model_have_its_unit_on_their_axes():
    study = make_study([2, 4], level=1.0, num_epochs=3000, target=0.5)
    study.summary["loss_metric"], study.summary["loss_unit"] = "model_loss", "nats"
    figures = study_figures(study)
    last = study.summary["population_loss"].iloc[1]
    first = f"Rank 4 is predicted to cost {significant(last)[0]} nats per token; every rank is at its floor"
    assert texts(figures["loss_curves"])[0] == first
    assert texts(figures["floor"])[0].endswith(" is the smallest that can reach the target of 1 nats")
    for name, figure in figures.items():
        assert figure.axes[0].get_ylabel().startswith("loss increase (nats per token)"), name
        drawn = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [PREDICT_ZERO] * 2]
        assert len(drawn) == 1, name  # the zero predictor, in nats
        assert not figure.axes[0].child_axes, name  # no second scale
    (floors,) = (line for line in figures["floor"].axes[0].lines if str(line.get_label()).startswith("monarch: floor"))
    own = study.floor[study.floor["chain"] == "monarch"]
    assert list(floors.get_ydata()) == pytest.approx(list(own["loss_floor"]))
    assert "within 0.1% of the zero predictor's loss" in " ".join(texts(figures["gap"]))
    assert CHAIN.family in texts(figures["front"])[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.004,), ["0.004"]), ((0.004021, 0.0040214), ["0.004021", "0.0040214"]), ((1234.5,), ["1230"]), ((0.0,), ["0"])],
)
def test_increases_have_three_digits_or_as_many_as_tell_them_apart(values, expected):
    assert significant(*values) == expected
