"""Under the loss of the model, every text about a loss has its unit; tests of single texts have the energy."""

import pytest
from drawn_study import CHAIN, PREDICT_ZERO, make_study, texts
from study_rows import make_row

from ks.bounds.rank_floors import TargetRanks
from ks.files.columns import PLANNED_RANKS
from ks.files.table import table
from ks.moments.metric import LossMetric
from ks.report.answer import Facts, answer, target_note
from ks.report.figures.draw import study_figures
from ks.report.sentences import advice
from ks.report.words import Words, percents, significant

NATS = Words(LossMetric.MODEL_LOSS, "nats", 0.5)


def row_of(**changes):
    """A rank that costs 0.01 of the 0.5 nats of the zero predictor, and whose floor is 0.005 nats."""
    row = make_row(0.02, 0.02, 0.01, rank=4) | {"loss_metric": "model_loss", "loss_unit": "nats"}
    return row | {"predict_zero_loss": 0.5, "loss_increase": 0.01, "energy_loss": 0.006} | changes


def test_words_come_from_a_row_and_those_of_earlier_versions_are_about_energy():
    assert Words.of(row_of()) == NATS
    assert Words.of({"rank": 2, "predict_zero_loss": None}) == Words()


@pytest.mark.parametrize(
    ("unit", "amount", "label", "both"),
    [
        ("nats", "0.01 nats", "(nats per token)", "0.01 nats per token (perplexity × 1.01)"),
        ("squared change", "0.01", "(per token)", "0.01 per token (squared change)"),
        ("", "0.01", "(per token)", "0.01 per token"),
    ],
)
def test_a_unit_of_several_words_is_no_part_of_a_number_and_only_nats_have_a_perplexity(unit, amount, label, both):
    words = Words(LossMetric.MODEL_LOSS, unit, 0.5)
    assert words.amounts(0.02) == [amount]
    assert words.show(0.02) == f"{amount} per token"
    assert words.label == f"loss increase {label}"
    assert words.both_metrics(row_of()) == [
        f"Rank 4 is predicted to cost the model about {both}; it loses 0.60% of the output energy."
    ]
    energy = Words(unit=unit)  # another sentence has the energy that is lost
    assert energy.both_metrics(row_of()) == [f"Rank 4 is predicted to cost the model about {both}."]


def test_a_table_of_bounds_is_in_nats():
    row = {"rank": 2, "relative_floor": 0.02, "relative_floor_upper": None, "lowrank_floor": 0.01}
    assert Words().in_its_unit(row) == row
    assert NATS.in_its_unit(row) == {"rank": 2, "loss_floor": 0.01, "lowrank_floor": 0.005}
    heads, line, *legends = table(NATS.with_units(PLANNED_RANKS), [NATS.in_its_unit(row)]).splitlines()[1:]
    assert line.split() == ["2", "0.01", "0.005"]
    assert legends[0].endswith(", in nats per token.")


@pytest.mark.parametrize(
    ("changes", "target", "first"),
    [
        ({}, 0.02, "Rank 4 is the smallest trained rank that costs at most 0.01 nats per token: it costs 0.01 nats, "),
        ({}, 0.015, "0.0075 nats per token is not reached: rank 4 ends at 0.01 nats, its floor is 0.005 nats"),
        ({"loss_floor_is_exact": False}, 0.015, "0.0075 nats per token is not reached: rank 4 ends at 0.01 nats, the "
         "best known chain costs 0.005 nats"),
        ({}, None, "Rank 4 costs least: it costs 0.01 nats per token, with "),
        ({"relative_loss": 1e-9}, None, "Rank 4 is the smallest trained rank that costs nothing: it has "),
    ],
)  # fmt: skip
def test_the_answer_begins_with_the_cost_and_has_both_metrics_once(changes, target, first):
    found = None if target is None else TargetRanks(target, 4, 4, target, True)
    lines = answer([row_of(**changes)], Facts(target=found), target)
    assert lines[0].startswith(first)
    assert sum(line.startswith("Rank 4 is predicted to cost the model about 0.01 ") for line in lines) == 1


def test_the_other_sentences_of_an_answer_are_in_nats():
    row = row_of(
        loss_floor_is_exact=False, relative_floor_upper=0.015, held_out_relative_loss=0.04, final_val_loss=0.015
    )
    lines = answer([row], Facts({4: (9, 0.011)}), 0.025)
    for line in (
        "No chain of rank 4 costs less than 0.005 nats; the best known one costs 0.0075 nats.",
        "A low-rank factorisation of the same size (rank 9) can reach 0.0055 nats; this chain is trained to 0.01 "
        "nats and is known to reach 0.0075 nats; sweep --chain lowrank as well.",
        "WARNING: on held-out inputs, rank 4 costs 0.015 nats, more than 0.0125 nats.",
    ):
        assert line in lines
    assert not any("%" in line for line in lines if "parameters" not in line and "output energy" not in line)
    assert "so choose with --target_loss_increase." in answer([row_of()] * 3, Facts())[0]


def test_advice_and_the_note_on_a_target_are_in_nats():
    changes = {"relative_loss": 0.0105, "excess": 0.0005, "held_out_relative_loss": 0.04, "final_val_loss": 0.015}
    row = row_of(verdict="within 0.1% of the zero predictor's loss, calibration-limited", **changes)
    assert advice([row])[:2] == [
        "Rank 4 is within 0.1% of the zero predictor's loss: its loss exceeds the floor by 0.00025 nats per token. A "
        "larger --num_epochs gains little.",
        "Rank 4 is calibration-limited: it costs 0.015 nats on held-out inputs, 0.00525 nats on the measured ones. "
        "Measure more inputs.",
    ]
    found = TargetRanks(0.02, 4, 4, 0.01, True)
    assert target_note(found, False, NATS).startswith("target 0.01 nats per token, for the measured inputs: rank 4 is ")


def test_figures_of_the_loss_of_the_model_have_its_unit_on_their_axes():
    study = make_study([2, 4], level=1.0, num_epochs=3000, target=0.5, held_out_predict_zero_loss=1.7)
    study.summary["loss_metric"], study.summary["loss_unit"] = "model_loss", "nats"
    figures = study_figures(study)
    last = study.summary["population_loss"].iloc[1]
    first = f"Rank 4 is predicted to cost {significant(last)[0]} nats per token; every rank is at its floor"
    assert texts(figures["loss_curves"])[0] == first
    assert figures["floor"].finding.endswith(" is the smallest that can reach the target of 1 nats")
    for name, figure in figures.items():
        assert figure.axes[0].get_ylabel().startswith("loss increase (nats per token)"), name
        drawn = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [PREDICT_ZERO] * 2]
        assert len(drawn) == 1, name  # the zero predictor, in nats
        assert not figure.axes[0].child_axes, name  # no second scale
    held_out = [list(line.get_ydata()) for line in figures["loss_curves"].axes[1].lines]
    assert [1.7, 1.7] in held_out
    assert [PREDICT_ZERO] * 2 not in held_out
    (floors,) = (line for line in figures["floor"].axes[0].lines if str(line.get_label()).startswith("monarch: floor"))
    own = study.floor[study.floor["chain"] == "monarch"]
    assert list(floors.get_ydata()) == pytest.approx(list(own["loss_floor"]))
    assert "within 0.1% of the zero predictor's loss" in " ".join(texts(figures["gap"]))
    assert CHAIN.family in texts(figures["front"])[0]


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        (percents, (0.1, 0.1007), ["10%", "10.07%"]),
        (percents, (0.1, 0.100001), ["10%", "10.0001%"]),
        (percents, (1e-5, 1.0), ["0.001%", "100%"]),
        (significant, (0.004021, 0.0040214), ["0.004021", "0.0040214"]),
        (significant, (1234.5,), ["1230"]),
        (significant, (0.0,), ["0"]),
    ],
)
def test_losses_have_as_many_digits_as_tell_different_ones_apart(form, values, expected):
    assert form(*values) == expected
