from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors as mpl_colors

from ks import plots
from ks.results import SweepFiles, summarise


def make_study(ranks, num_epochs=10, level=1.0):
    epochs = range(1, num_epochs + 1)
    runs = {
        rank: [
            {"epoch": e, "train_loss": level / rank + 1 / e, "val_loss": level / rank + 1.1 / e, "rank": rank}
            for e in epochs
        ]
        for rank in ranks
    }
    curves = pd.DataFrame([row for run in runs.values() for row in run])
    return curves, pd.DataFrame([summarise(rank, run) for rank, run in runs.items()])


def luminance(color):
    return np.dot(mpl_colors.to_rgb(color), (0.299, 0.587, 0.114))


def test_colours_are_distinct_and_ordered_in_lightness_so_that_grey_and_colour_blind_readers_see_the_order():
    colors = plots.rank_colors([2**k for k in range(12)])
    shades = [luminance(colors[rank]) for rank in sorted(colors)]
    assert all(later > earlier + 0.01 for earlier, later in pairwise(shades))
    assert shades[-1] < 0.85


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(("ranks", "num_epochs"), [([8], 1), ([2, 4], 1), ([2**k for k in range(12)], 30)])
def test_figures_of_one_and_of_many_ranks_are_drawn(tmp_path, ranks, num_epochs, log_scale):
    curves, summary = make_study(ranks, num_epochs)
    figures = plots.study_figures(curves, summary, log_scale=log_scale)
    paths = plots.save_figures(figures, SweepFiles(tmp_path, "p"), ["png"], dpi=40)
    assert [path.name for path in paths] == ["p_loss_curves.png", "p_final_losses.png"]
    for axes in figures["loss_curves"].axes:
        labels = [text for text in axes.texts if text.get_text() != "rank"]
        assert sorted(text.get_text() for text in labels) == sorted(map(str, ranks))
        assert axes.get_yscale() == ("log" if log_scale else "linear")


def test_labels_of_lines_that_end_together_are_pushed_apart():
    curves, _ = make_study([2**k for k in range(12)], 30, level=1e-6)
    axes = plots.loss_curves(curves).axes[0]
    heights = sorted(text.xyann[1] for text in axes.texts if text.get_text() != "rank")
    assert min(np.diff(heights)) > 0.02


def test_a_log_axis_has_ticks_even_where_the_losses_are_close():
    curves, _ = make_study([2, 3], 2, level=0.01)
    curves["val_loss"] = curves["train_loss"] = 1.5
    axes = plots.loss_curves(curves, log_scale=True).axes[0]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_failed_rank_is_shown_with_its_status_and_no_bar():
    curves, summary = make_study([2, 4])
    summary.loc[1, ["final_train_loss", "final_val_loss"]] = np.nan
    summary.loc[1, "status"] = "diverged"
    axes = plots.final_losses(summary).axes[0]
    assert "diverged" in [text.get_text() for text in axes.texts]
    lines = plots.study_figures(curves, summary)["loss_curves"].axes[0]
    assert "4 (failed)" in [text.get_text() for text in lines.texts]


def test_a_study_in_which_nothing_finished_still_has_its_bars_figure(tmp_path):
    summary = pd.DataFrame([summarise(2, [], "diverged"), summarise(4, [], "diverged")])
    figures = plots.study_figures(pd.DataFrame(), summary, log_scale=True)
    assert list(figures) == ["final_losses"]
    plots.save_figures(figures, SweepFiles(tmp_path, "p"), ["svg"], dpi=40)


def test_nan_epochs_leave_a_gap_and_do_not_break_the_axis(tmp_path):
    curves, summary = make_study([2, 4])
    curves.loc[curves["rank"] == 4, ["train_loss", "val_loss"]] = np.nan
    plots.save_figures(plots.study_figures(curves, summary, log_scale=True), SweepFiles(tmp_path, "p"), ["png"], 40)
