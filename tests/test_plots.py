from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colors as mpl_colors

import ks
from ks import plots, results, summary
from ks.plan import make_plan
from ks.results import SweepFiles
from ks.study import Study

WEIGHT = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
CHAIN = ks.make_chain(64, 96)
PLAN = make_plan(WEIGHT, CHAIN, predict_zero=2.0)


def make_study(ranks, num_epochs=10, level=1.1, statuses=None, seeds=(None,)):
    """Curves that fall towards `level` times the floor of each rank."""
    epochs, rows = [], []
    for rank, floor in zip(ranks, PLAN.floors(ranks)):
        runs = []
        for index, seed in enumerate(seeds):
            values = [floor.lower * level * (1 + 0.01 * index) + 1 / (epoch + 1) for epoch in range(1, num_epochs + 1)]
            runs.append([
                {"epoch": epoch, "train_loss": loss, "val_loss": 1.01 * loss, "rank": rank, "population_loss": loss}
                for epoch, loss in enumerate(values, 1)
            ])  # fmt: skip
            epochs += [row | {"seed": seed} for row in runs[-1]]
        status = (statuses or {}).get(rank, "ok")
        run_rows = [summary.run_row(rank, run if status == "ok" else [], status) for run in runs]
        rows.append(summary.rank_row(run_rows, CHAIN, floor, 2.0))
    table = pd.DataFrame([{name: row.get(name) for name in results.SUMMARY_COLUMNS} for row in rows])
    return Study("study", pd.DataFrame(epochs), table, pd.DataFrame(PLAN.curve_rows()), "title", CHAIN.describe(), None)


def luminance(color):
    return np.dot(mpl_colors.to_rgb(color), (0.299, 0.587, 0.114))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_colours_are_distinct_and_ordered_in_lightness_so_that_grey_and_colour_blind_readers_see_the_order():
    colors = plots.rank_colors([2**k for k in range(12)])
    shades = [luminance(colors[rank]) for rank in sorted(colors)]
    assert all(later > earlier + 0.01 for earlier, later in pairwise(shades))
    assert shades[-1] < 0.85


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(("ranks", "num_epochs"), [([8], 1), ([2, 4], 1), (list(range(1, 13)), 30)])
def test_figures_of_one_and_of_many_ranks_are_drawn(tmp_path, ranks, num_epochs, log_scale):
    study = make_study(ranks, num_epochs)
    figures = plots.study_figures(study, log_scale=log_scale)
    paths = plots.save_figures(figures, SweepFiles(tmp_path, "p"), ["png"], dpi=40)
    assert [path.name for path in paths] == ["p_loss_curves.png", "p_final_losses.png", "p_floor.png"]
    for axes in figures["loss_curves"].axes:
        assert sorted(texts(axes)) == sorted([*map(str, ranks), "rank"])
        assert axes.get_yscale() == ("log" if log_scale else "linear")


def test_every_rank_has_its_floor_dashed_in_its_colour():
    study = make_study([2, 4])
    axes = plots.study_figures(study)["loss_curves"].axes[1]
    colors = plots.rank_colors([2, 4])
    floors = dict(zip(study.summary["rank"], study.summary["loss_floor"]))
    dashed = {tuple(line.get_color()): line.get_ydata()[0] for line in axes.lines[:-1] if line.is_dashed()}
    assert dashed == {colors[rank]: floors[rank] for rank in (2, 4)}


def test_bars_carry_a_tick_at_the_floor():
    study = make_study([2, 4])
    axes = plots.final_losses(study.summary).axes[0]
    (ticks,) = [lines for lines in axes.collections if len(lines.get_segments()) == 2]
    assert [segment[0][1] for segment in ticks.get_segments()] == list(study.summary["loss_floor"])


def test_the_floor_figure_has_both_curves_the_trained_ranks_and_the_marks():
    study = make_study([2, 4])
    axes = plots.study_figures(study, log_scale=True)["floor"].axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["monarch: floor of every rank", "low-rank at equal parameters", "trained (number: rank)"]
    assert {"2", "4", "predicting 0", "dense"} <= set(texts(axes))
    points = {line.get_xdata()[0]: line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"}
    assert points == dict(zip(study.summary["parameters"], study.summary["relative_loss"]))


def test_seeds_give_bands_and_whiskers():
    single, several = make_study([2, 4]), make_study([2, 4], seeds=(None, 1, 2))
    bands = [len(plots.study_figures(study)["loss_curves"].axes[0].collections) for study in (single, several)]
    assert bands == [0, 2]
    assert not single.summary["final_val_loss_se"].notna().any()
    assert several.summary["final_val_loss_se"].notna().all()


def test_labels_of_lines_that_end_together_are_pushed_apart():
    study = make_study(list(range(1, 13)), 30)
    study.curves["train_loss"] = 1.0
    axes = plots.study_figures(study)["loss_curves"].axes[0]
    heights = sorted(text.xyann[1] for text in axes.texts if text.get_text() != "rank")
    assert min(np.diff(heights)) > 0.02


def test_a_log_axis_has_ticks_even_where_the_losses_are_close():
    study = make_study([12, 13], 2)
    study.curves["val_loss"] = study.curves["train_loss"] = 1.5
    axes = plots.loss_curves(study.curves, study.summary.assign(loss_floor=np.nan), log_scale=True).axes[0]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_failed_rank_is_shown_with_its_status_and_no_bar():
    figures = plots.study_figures(make_study([2, 4], statuses={4: "diverged"}))
    assert "diverged" in texts(figures["final_losses"].axes[0])
    assert "4 (failed)" in texts(figures["loss_curves"].axes[0])


def test_a_study_in_which_nothing_finished_still_has_its_bars_figure(tmp_path):
    study = make_study([2, 4], num_epochs=0, statuses={2: "diverged", 4: "diverged"})
    figures = plots.study_figures(study, log_scale=True)
    assert list(figures) == ["final_losses"]
    plots.save_figures(figures, SweepFiles(tmp_path, "p"), ["svg"], dpi=40)


def test_nan_epochs_and_floors_of_zero_do_not_break_a_log_axis(tmp_path):
    study = make_study([2, CHAIN.saturation_rank])
    study.curves.loc[study.curves["rank"] == 2, ["train_loss", "val_loss"]] = np.nan
    study.summary.loc[1, "loss_floor"] = 0.0
    figures = plots.study_figures(study, log_scale=True)
    plots.save_figures(figures, SweepFiles(tmp_path, "p"), ["png"], 40)


def test_chains_side_by_side(tmp_path):
    studies = [make_study([2, 4]), make_study([1, 8])]
    figure = plots.chains(studies, log_scale=True)
    plots.save_figures({"chains": figure}, SweepFiles(tmp_path, "p"), ["png"], 40)
    assert len(figure.axes[0].get_legend().get_texts()) == 2
    old = studies[0].summary.assign(relative_loss=np.nan)
    with pytest.raises(ValueError, match="no relative losses"):
        plots.chains([Study("old", studies[0].curves, old, studies[0].floor, None, None, None)])
