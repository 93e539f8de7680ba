"""Plans that were measured, beside equal fractions of the same budget; a plan that is worse than it promised is red."""

import dataclasses

import pytest
from drawn_study import make_plan, texts
from matplotlib.colors import to_hex

import plot_rank_results
from ks.report.figures.by_prediction import MISJUDGED, points_of
from ks.report.figures.draw import plans_figures

GOOD = make_plan(12, 0.189, 0.387, 0.285, 0.642)
BAD = make_plan(8, 0.481, 1.284, 0.613, 0.87)


def test_a_plan_and_its_equal_fractions_are_two_points_of_one_budget():
    assert points_of(GOOD) == {"plan": (0.189, 0.387), "uniform": (0.285, 0.642)}
    assert [*points_of(GOOD.measured(0.387))] == ["plan"]
    assert points_of(GOOD.measured(-0.01)) == {}  # no place on a logarithmic axis


@pytest.mark.parametrize(
    ("plans", "finding", "red"),
    [
        ([GOOD], "The measured increase is 2 to 2.3 times the predicted one", 0),
        (
            [GOOD, BAD],
            "WARNING: with 50% of the parameters, the plan is predicted to cost less than equal fractions, and was "
            "measured to cost more",
            1,
        ),
    ],
)
def test_the_figure_finds_the_plan_that_is_worse_than_equal_fractions(plans, finding, red):
    figure = plans_figures(plans)["plans"]
    (axes,) = figure.axes
    assert texts(figure)[0].replace("\n", " ") == finding
    assert sum(to_hex(line.get_color()) == to_hex(MISJUDGED) for line in axes.lines) == red
    assert axes.get_xlabel() == "predicted loss increase (nats per token)"
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["75%", "50%"][: len(plans)] * 2
    figure = plans_figures([make_plan(12, 1.0, 2.0, 3.0, 4.0, "two words")])["plans"]
    assert figure.axes[0].get_ylabel().endswith("(per token)")


@pytest.mark.usefixtures("blank_pictures")
def test_measured_plans_in_a_folder_are_drawn_and_printed_without_a_sweep(tmp_path, capsys):
    GOOD.save(tmp_path / "good_plan.json")
    BAD.save(tmp_path / "bad_plan.json")
    dataclasses.replace(GOOD, measured_increase=None).save(tmp_path / "rank_sweep_plan.json")
    assert plot_rank_results.main(["--results_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(tmp_path / "rank_sweep_plans.png")
    assert printed.startswith("WARNING: this plan ")
    assert printed.count("Measured: ") == 2
    dataclasses.replace(GOOD, unit="bits").save(tmp_path / "other_plan.json")
    assert plot_rank_results.main(["--results_dir", str(tmp_path)]) == 2
    assert "different losses" in capsys.readouterr().err
    (tmp_path / "other_plan.json").unlink()
    (tmp_path / "good_plan.json").unlink()
    (tmp_path / "bad_plan.json").unlink()
    assert plot_rank_results.main(["--results_dir", str(tmp_path)]) == 2  # no results, as ever
