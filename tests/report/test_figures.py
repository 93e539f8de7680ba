from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colors as mpl_colors

import ks
from ks.bounds.plan import make_plan
from ks.errors import UsageError
from ks.files.layout import SweepFiles
from ks.files.status import OK, Ending, Status
from ks.report import figures
from ks.report.study import Study, floor_frame, summary_frame
from ks.report.summary import Reference, rank_row, run_row
from ks.training.losses import LossKind

WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
CHAIN = ks.make_chain(64, 96)
PLAN = make_plan(WEIGHT * 8 / WEIGHT.norm(), CHAIN)
PREDICT_ZERO = 2.0
DIVERGED = Ending(Status.DIVERGED)


def make_study(ranks, num_epochs=10, level=1.1, endings=None, seeds=(None,), **described):
    """Curves that fall towards `level` times the floor of each rank."""
    epochs, rows = [], []
    for rank, floor in zip(ranks, PLAN.floors(ranks)):
        runs = []
        for index, seed in enumerate(seeds):
            least = floor.lower * PREDICT_ZERO * level * (1 + 0.01 * index)
            values = [least + 1 / (epoch + 1) for epoch in range(1, num_epochs + 1)]
            runs.append([
                {"epoch": epoch, "train_loss": loss, "val_loss": 1.01 * loss, "rank": rank, "population_loss": loss}
                for epoch, loss in enumerate(values, 1)
            ])  # fmt: skip
            epochs += [row | {"seed": seed} for row in runs[-1]]
        ending = (endings or {}).get(rank, OK)
        run_rows = [run_row(rank, run if ending == OK else [], ending) for run in runs]
        rows.append(rank_row(run_rows, CHAIN, floor, Reference(PREDICT_ZERO)))
    described = {"title": "title", "chain": CHAIN.describe()} | described
    return Study("study", pd.DataFrame(epochs), summary_frame(rows), floor_frame(PLAN, PREDICT_ZERO), **described)


def luminance(color):
    return np.dot(mpl_colors.to_rgb(color), (0.299, 0.587, 0.114))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_colours_are_distinct_and_ordered_in_lightness_so_that_grey_and_colour_blind_readers_see_the_order():
    colors = figures.rank_colors([2**k for k in range(12)])
    shades = [luminance(colors[rank]) for rank in sorted(colors)]
    assert all(later > earlier + 0.01 for earlier, later in pairwise(shades))
    assert shades[-1] < 0.85


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(("ranks", "num_epochs"), [([8], 1), ([2, 4], 1), (list(range(1, 13)), 30)])
def test_figures_of_one_and_of_many_ranks_are_drawn(tmp_path, ranks, num_epochs, log_scale):
    study = make_study(ranks, num_epochs)
    drawn = figures.study_figures(study, log_scale=log_scale)
    paths = figures.save_figures(drawn, SweepFiles(tmp_path, "p"), ["png"], dpi=40)
    assert [path.name for path in paths] == ["p_loss_curves.png", "p_final_losses.png", "p_floor.png"]
    for axes in drawn["loss_curves"].axes:
        assert sorted(texts(axes)) == sorted([*map(str, ranks), "rank"])
        assert axes.get_yscale() == ("log" if log_scale else "linear")


def test_every_rank_has_its_floor_dashed_in_its_colour():
    study = make_study([2, 4])
    axes = figures.study_figures(study)["loss_curves"].axes[1]
    colors = figures.rank_colors([2, 4])
    floors = dict(zip(study.summary["rank"], study.summary["loss_floor"]))
    dashed = {tuple(line.get_color()): line.get_ydata()[0] for line in axes.lines[:-1] if line.is_dashed()}
    assert dashed == {colors[rank]: floors[rank] for rank in (2, 4)}


def test_bars_carry_a_tick_at_the_floor():
    study = make_study([2, 4])
    axes = figures.final_losses(study.summary).axes[0]
    (ticks,) = [lines for lines in axes.collections if len(lines.get_segments()) == 2]
    assert [segment[0][1] for segment in ticks.get_segments()] == list(study.summary["loss_floor"])


def test_the_floor_figure_has_both_curves_the_trained_ranks_and_the_marks():
    study = make_study([2, 4])
    axes = figures.study_figures(study, log_scale=True)["floor"].axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["monarch: floor of every rank", "low-rank at equal parameters", "trained (number: rank)"]
    assert {"2", "4", "predicting 0", "dense"} <= set(texts(axes))
    points = {line.get_xdata()[0]: line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"}
    assert points == dict(zip(study.summary["parameters"], study.summary["relative_loss"]))


@pytest.mark.parametrize(
    "title", ["model.safetensors encoder.layer.0.output.dense.weight, 384 × 1536: monarch", "$five dollars " * 12]
)
def test_a_long_title_fits_into_every_figure(title):
    drawn = figures.study_figures(make_study([2, 4], title=title))
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        text = figure._suptitle if name == "loss_curves" else figure.axes[0]._left_title
        extent = text.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.x1
    assert set(drawn) == {"loss_curves", "final_losses", "floor"}


def test_seeds_give_bands_and_whiskers():
    single, several = make_study([2, 4]), make_study([2, 4], seeds=(None, 1, 2))
    bands = [len(figures.study_figures(study)["loss_curves"].axes[0].collections) for study in (single, several)]
    assert bands == [0, 2]
    assert not single.summary["final_val_loss_se"].notna().any()
    assert several.summary["final_val_loss_se"].notna().all()


def test_labels_of_lines_that_end_together_are_pushed_apart():
    study = make_study(list(range(1, 13)), 30)
    study.curves["train_loss"] = 1.0
    axes = figures.study_figures(study)["loss_curves"].axes[0]
    heights = sorted(text.xyann[1] for text in axes.texts if text.get_text() != "rank")
    assert min(np.diff(heights)) > 0.02


def test_a_log_axis_has_ticks_even_where_the_losses_are_close():
    study = make_study([12, 13], 2)
    study.curves["val_loss"] = study.curves["train_loss"] = 1.5
    axes = figures.loss_curves(study.curves, study.summary.assign(loss_floor=np.nan), log_scale=True).axes[0]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_failed_rank_is_shown_with_its_status_and_no_bar():
    drawn = figures.study_figures(make_study([2, 4], endings={4: DIVERGED}))
    assert "diverged" in texts(drawn["final_losses"].axes[0])
    assert "4 (failed)" in texts(drawn["loss_curves"].axes[0])


def test_a_study_in_which_nothing_finished_still_has_its_bars_figure(tmp_path):
    study = make_study([2, 4], num_epochs=0, endings={2: DIVERGED, 4: DIVERGED})
    drawn = figures.study_figures(study, log_scale=True)
    assert list(drawn) == ["final_losses"]
    figures.save_figures(drawn, SweepFiles(tmp_path, "p"), ["svg"], dpi=40)


def test_nan_epochs_and_floors_of_zero_do_not_break_a_log_axis(tmp_path):
    study = make_study([2, CHAIN.saturation_rank])
    study.curves.loc[study.curves["rank"] == 2, ["train_loss", "val_loss"]] = np.nan
    study.summary.loc[1, "loss_floor"] = 0.0
    drawn = figures.study_figures(study, log_scale=True)
    figures.save_figures(drawn, SweepFiles(tmp_path, "p"), ["png"], 40)


def test_chains_side_by_side(tmp_path):
    studies = [make_study([2, 4]), make_study([1, 8])]
    figure = figures.chains(studies, log_scale=True)
    figures.save_figures({"chains": figure}, SweepFiles(tmp_path, "p"), ["png"], 40)
    assert len(figure.axes[0].get_legend().get_texts()) == 2
    old = studies[0].summary.assign(relative_loss=np.nan)
    with pytest.raises(UsageError, match="no relative losses"):
        figures.chains([Study("old", studies[0].curves, old, studies[0].floor)])


@pytest.mark.parametrize("kind", LossKind)
def test_the_kind_of_loss_is_on_the_axes_of_the_losses(kind):
    drawn = figures.study_figures(make_study([2, 4], loss_label=kind.value))
    assert drawn["loss_curves"].axes[0].get_ylabel() == kind.value
    assert drawn["final_losses"].axes[0].get_ylabel() == f"final {kind.value}"
    assert drawn["floor"].axes[0].get_ylabel() == "share of the output energy lost"


def test_without_a_label_the_losses_are_mean_squared_errors():
    assert figures.study_figures(make_study([2]))["loss_curves"].axes[0].get_ylabel() == "mean squared error per output"
