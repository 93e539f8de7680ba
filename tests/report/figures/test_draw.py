import dataclasses

import numpy as np
import pytest
from drawn_study import CHAIN, DIVERGED, PREDICT_ZERO, make_study, texts
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgba

from ks.files.layout import FIGURES, SweepFiles
from ks.report.figures.by_cost import front_of
from ks.report.figures.draw import DRAWN, chains_figures, save_figures, study_figures
from ks.report.figures.parts import FAMILY_COLORS, rank_colors


def test_every_figure_has_its_name_in_the_layout():
    assert tuple(DRAWN) == FIGURES


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(("ranks", "num_epochs"), [([8], 1), (list(range(1, 13)), 30)])
def test_figures_of_one_and_of_many_ranks_are_drawn(tmp_path, ranks, num_epochs, log_scale):
    """The zero predictor and dense are marked in all of them."""
    study = make_study(ranks, num_epochs, times={rank: (1.0, 2.0) for rank in ranks})
    drawn = study_figures(study, log_scale=log_scale)
    paths = save_figures(drawn, SweepFiles(tmp_path, "p"), ["png"], dpi=40)
    assert [path.name for path in paths] == [f"p_{name}.png" for name in FIGURES]
    for axes in drawn["loss_curves"].axes:
        assert {*map(str, ranks), "rank"} < {text.get_text() for text in axes.texts}
        assert axes.get_yscale() == ("log" if log_scale else "linear")
    for name, figure in drawn.items():
        low = "dense ↓" if log_scale or name == "gap" else "dense"
        assert {"title", "zero predictor", low} <= {*texts(figure)}, name


@pytest.mark.parametrize("spread", [1.0, 1.2])
def test_curves_and_final_losses_have_the_floor_of_every_rank_or_both_bounds(spread):
    study, colors = make_study([2, 4], spread=spread), rank_colors([2, 4])
    drawn = study_figures(study)
    lines = [line for line in drawn["loss_curves"].axes[1].lines if line.is_dashed()]
    dashed = [(tuple(line.get_color()), line.get_ydata()[0]) for line in lines]
    assert len(dashed) == (4 if spread > 1 else 2)
    for row in study.summary.itertuples():
        bounds = {value for color, value in dashed if color == colors[row.rank]}
        assert bounds == {row.loss_floor / 2.0, row.loss_floor_upper / 2.0}
    lower, upper, between = drawn["final_losses"].axes[0].collections
    for ticks, column in ((lower, "loss_floor"), (upper, "loss_floor_upper")):
        assert [segment[0][1] for segment in ticks.get_segments()] == list(study.summary[column] / 2.0)
    assert len(between.get_segments()) == (2 if spread > 1 else 0)


def test_bars_stand_on_zero_and_a_log_axis_has_points_and_the_right_axis_has_squared_units():
    study = make_study([2, 4])
    figures = [study_figures(study, log_scale=scale)["final_losses"] for scale in (False, True)]
    linear, log = (figure.axes[0] for figure in figures)
    heights = [bar.get_height() for bar in linear.patches]
    assert heights == [*study.summary["final_train_loss"] / 2.0, *study.summary["final_val_loss"] / 2.0]
    assert linear.get_ylim()[0] == 0
    assert not log.patches
    (squared,) = linear.child_axes
    figures[0].draw_without_rendering()
    assert squared.get_ylabel() == "mean squared error per output"
    assert squared.get_ylim() == pytest.approx(2.0 * np.array(linear.get_ylim()))


def points_in(axes) -> dict[float, float]:
    """Return the losses of the points that `mark_ranks` drew, by their places."""
    (points,) = (drawn for drawn in axes.collections if isinstance(drawn, PathCollection))
    return dict(points.get_offsets().tolist())


def test_the_floor_figure_has_the_trained_ranks_and_the_target():
    study = make_study([2, 4], target=0.9)
    axes = study_figures(study, log_scale=True)["floor"].axes[0]
    assert points_in(axes) == dict(zip(study.summary["rank"], study.summary["relative_loss"]))
    assert 0.9 in [line.get_ydata()[0] for line in axes.lines if line.get_label() == "target"]


def test_the_gap_falls_to_the_distance_at_the_end():
    study = make_study([2, 4])
    axes = study_figures(study)["gap"].axes[0]
    ends = sorted(line.get_ydata()[-1] for line in axes.lines if line.get_marker() == "o")
    assert ends == pytest.approx(sorted(study.summary["excess"]))


def test_latency_has_the_times_of_every_rank_and_of_dense_for_each_measured_batch():
    study = make_study([2, 4, 8], times={2: (1.0, 2.0), 4: (3.0, 2.5), 8: (5.0, 7.0)})
    figure = study_figures(study)["latency"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"batch {batch} (dense: 2.5 ms)" for batch in (1, 32, 1024)
    ]
    for axes in figure.axes:
        assert points_in(axes) == dict(zip((1.0, 3.0, 5.0), study.summary["relative_loss"]))
        assert [2.5, 2.5] in [list(line.get_xdata()) for line in axes.lines]
    study = dataclasses.replace(study, summary=study.summary.assign(latency_ms_batch_1024=np.nan))
    assert len(study_figures(study)["latency"].axes) == 2


def test_the_front_is_the_least_loss_of_all_families_and_of_what_was_trained():
    study = make_study([2, 4], level=0.5)
    front = front_of(study)
    for parameters, least in zip(front["parameters"], front["relative_loss"]):
        floors = study.floor[study.floor["parameters"] <= parameters]["relative_loss"]
        trained = study.summary[study.summary["parameters"] <= parameters]["relative_loss"]
        assert least == min([*floors, *trained])
    assert front["relative_loss"].is_monotonic_decreasing
    study = make_study([2, 4], spread=2.0, level=1.0)  # whose floors no chain is known to reach
    own, front = study.floor[study.floor["chain"] == "monarch"], front_of(study)
    at_own = np.interp(own["parameters"], front["parameters"], front["relative_loss"])
    assert (at_own > own["relative_loss"])[:-1].all()


@pytest.mark.parametrize(("level", "off"), [(1.0, False), (1.3, True)])
def test_a_trained_rank_is_hollow_where_as_many_parameters_can_lose_less(level, off):
    figure = study_figures(make_study([2, 4], level=level, num_epochs=3000))["front"]
    points = next(drawn for drawn in figure.axes[0].collections if isinstance(drawn, PathCollection))
    assert points.get_facecolors().tolist() == [[*to_rgba("white" if off else FAMILY_COLORS[0])]] * 2
    assert ("trained, and off the front" in [text.get_text() for text in figure.legends[0].get_texts()]) == off


def test_seeds_give_bands_and_whiskers():
    single, several = make_study([2, 4]), make_study([2, 4], seeds=(None, 1, 2))
    drawn = [study_figures(study)["loss_curves"].axes[0].collections for study in (single, several)]
    assert [sum(isinstance(entry, PolyCollection) for entry in collections) for collections in drawn] == [0, 2]
    whiskers = [len(study_figures(study)["final_losses"].axes[0].containers) for study in (single, several)]
    assert whiskers[1] == whiskers[0] + 2


def test_a_failed_rank_is_shown_with_its_status_and_no_bar():
    drawn = study_figures(make_study([2, 4], endings={4: DIVERGED}))
    assert "diverged" in texts(drawn["final_losses"])
    assert "4 (failed)" in texts(drawn["loss_curves"])
    nothing = make_study([2, 4], num_epochs=0, endings={2: DIVERGED, 4: DIVERGED})
    drawn = study_figures(nothing, log_scale=True)
    assert list(drawn) == ["final_losses"]
    assert "No rank has finished" in texts(drawn["final_losses"])
    drawn["final_losses"].draw_without_rendering()


def test_nan_epochs_and_floors_of_zero_do_not_break_a_log_axis():
    study = make_study([2, CHAIN.saturation_rank])
    study.curves.loc[study.curves["rank"] == 2, ["train_loss", "val_loss"]] = np.nan
    study.summary.loc[1, ["loss_floor", "loss_floor_upper"]] = 0.0
    for figure in study_figures(study, log_scale=True).values():
        figure.draw_without_rendering()


def test_a_metric_has_a_line_for_each_rank_that_has_it():
    study = make_study([2, 4, 8], endings={4: DIVERGED})
    curves = study.curves.assign(cosine=1 - study.curves["val_loss"])
    curves.loc[curves["rank"] == 8, "cosine"] = np.nan
    study = dataclasses.replace(study, curves=curves, summary=study.summary.assign(final_cosine=[0.5, None, None]))
    drawn = study_figures(study, log_scale=True, metrics=["cosine", "unknown"])
    assert "metric_unknown" not in drawn
    (axes,) = drawn["metric_cosine"].axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("cosine", "linear")
    assert [list(line.get_ydata()) for line in axes.lines] == [
        list(curves["cosine"][curves["rank"] == rank]) for rank in (2, 4)
    ]
    assert {"At the end, cosine is 0.5 at rank 2", "2", "4 (failed)"} <= {*texts(drawn["metric_cosine"])}
    heights = [text.get_position()[1] for text in axes.texts[:-1]]
    ends = axes.transAxes.inverted().transform(axes.transData.transform([line.get_xydata()[-1] for line in axes.lines]))
    assert heights == pytest.approx(list(ends[:, 1]))
    low, high = axes.get_ylim()
    assert low < curves["cosine"].min() < curves["cosine"].max() < high
    for values, scale in (((0.1, 1.0), "log"), ((0.11, 1.0), "linear"), ((-1.0, 1.0), "linear")):  # within a decade
        short = make_study([2], num_epochs=2)
        short = dataclasses.replace(short, curves=short.curves.assign(r2=values))
        assert study_figures(short, log_scale=True, metrics=["r2"])["metric_r2"].axes[0].get_yscale() == scale


def test_chains_side_by_side():
    studies = [make_study([2, 4]), make_study([4, 8])]
    figure = chains_figures(studies, log_scale=True)["chains"]
    figure.draw_without_rendering()
    assert len(figure.legends[0].get_texts()) == 2
    assert texts(figure)[0].startswith("At equal size")
    both = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() == "4"]
    assert not both[0].overlaps(both[1])
    old = studies[0].summary.assign(population_loss=np.nan)
    assert chains_figures([dataclasses.replace(make_study([2, 4], predict_zero_loss=None), summary=old)]) == {}


def test_different_weights_are_drawn_relative_to_the_zero_predictor_and_dense_of_each():
    beyond = CHAIN.saturation_rank  # larger than the dense weight
    small = make_study([2, 4], weight={"sha256": "a"}, predict_zero_loss=10.0)
    large = make_study([1, beyond], weight={"sha256": "b"})
    large = dataclasses.replace(large, summary=large.summary.assign(loss_metric="model_loss"))
    small = dataclasses.replace(small, summary=small.summary.assign(loss_metric="model_loss", predict_zero_loss=10.0))
    (figure,) = chains_figures([small, large]).values()
    (axes,) = figure.axes
    assert axes.get_ylabel() == "loss relative to the zero predictor"
    points = [line for line in axes.lines if line.get_marker() in "os"]
    for study, line, zero in zip((small, large), points, (10.0, PREDICT_ZERO), strict=True):
        assert list(line.get_ydata()) == pytest.approx(list(study.summary["population_loss"] / zero))
        assert list(line.get_xdata()) == pytest.approx(list(study.summary["share_of_dense"]))
    assert large.summary["share_of_dense"].max() > 1.5
    assert axes.get_xlim()[1] == pytest.approx(large.summary["share_of_dense"].max())


def test_losses_that_do_not_compare_have_figures_of_their_own():
    energy, measured, model = (make_study([2, 4]) for _ in range(3))
    measured = dataclasses.replace(measured, summary=measured.summary.assign(inputs="measured 1234"))
    model = dataclasses.replace(model, summary=model.summary.assign(loss_metric="model_loss"))
    drawn = chains_figures([energy, measured, model, energy])
    assert {name: len(figure.legends[0].get_texts()) for name, figure in drawn.items()} == {
        "chains_output_energy_isotropic": 2,
        "chains_output_energy_measured": 1,
        "chains_model_loss_isotropic": 1,
    }


RELATIVE = "relative loss (output energy lost)"


@pytest.mark.parametrize(
    ("described", "label"),
    [
        ({}, RELATIVE),
        ({"criterion": "l1_loss of torch 2.13.0"}, "loss, l1_loss"),
        ({"predict_zero_loss": None}, "mean squared error per output"),
    ],
)
def test_the_unit_is_the_relative_loss_wherever_it_is_known(described, label):
    drawn = study_figures(make_study([2, 4], **described))
    labels = {name: figure.axes[0].get_ylabel() for name, figure in drawn.items()}
    if label == RELATIVE:
        assert all(text.startswith(RELATIVE) for text in labels.values())
        assert set(labels) == {"loss_curves", "final_losses", "floor", "gap", "front"}
    else:
        assert labels == {"loss_curves": label, "final_losses": f"final {label}"}
        assert "zero predictor" not in texts(drawn["loss_curves"])


def test_losses_on_held_out_inputs_are_relative_to_their_own_zero_predictor():
    study = make_study([2], held_out_predict_zero_loss=4.0)
    lines = [axes.lines[0].get_ydata()[-1] for axes in study_figures(study)["loss_curves"].axes]
    last = study.curves.iloc[-1]
    assert lines == [last["train_loss"] / 2.0, last["val_loss"] / 4.0]
