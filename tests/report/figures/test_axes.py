from itertools import pairwise

import numpy as np
import pytest
from drawn_study import make_study
from matplotlib import colors as mpl_colors
from matplotlib.figure import Figure

from ks.report.figures.axes import MOST_TICKS, log_ticks, write_heading
from ks.report.figures.colors import rank_colors
from ks.report.figures.draw import study_figures
from ks.report.figures.units import units_of
from ks.report.study import MEAN_SQUARED_ERROR


def luminance(color):
    """Return the relative luminance of the contrast ratio of the Web Content Accessibility Guidelines."""
    channels = np.array(mpl_colors.to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("count", [1, 2, 6, 12])
def test_colours_are_legible_on_white_and_ordered_in_lightness(count):
    shades = [luminance(color) for color in rank_colors([2**k for k in range(count)]).values()]
    assert all(later > earlier for earlier, later in pairwise(shades))
    assert all(1.05 / (shade + 0.05) >= 2.7 for shade in shades)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.3, 0.31), (0.006, 1.0), (3e-9, 1.0), (1e-300, 1e300), (7.0, 7.0), (1.0, 512.0), (2e4, 2.1e6), (0.0, 1.0)],
)
def test_a_log_axis_begins_and_ends_with_a_tick(low, high):
    ticks = log_ticks(low, high)
    assert ticks[0] <= max(low, 1e-290)
    assert ticks[-1] >= min(high, 1e290) * (1 - 1e-9)
    assert 2 <= len(ticks) <= MOST_TICKS
    assert all(later > earlier for earlier, later in pairwise(ticks))


def test_every_log_axis_of_every_figure_has_ticks_at_both_ends():
    study = make_study([2, 4], times={2: (1.0, 2.0), 4: (3.0, 2.0)})
    for figure in study_figures(study, log_scale=True).values():
        for axes in figure.axes:
            for name in "xy":
                if getattr(axes, f"get_{name}scale")() == "log":
                    ticks, limits = getattr(axes, f"get_{name}ticks")(), getattr(axes, f"get_{name}lim")()
                    assert (ticks[0], ticks[-1]) == pytest.approx(limits)


@pytest.mark.parametrize("width", [3.0, 5.2, 12.0])
@pytest.mark.parametrize(
    "name", ["model.safetensors encoder.layer.0.output.dense.weight, 384 × 1536: monarch", "$five dollars " * 12,
             "W" * 100, "encoder.layer.0.output.dense.weight." * 6],
)  # fmt: skip
def test_a_long_heading_wraps_and_is_never_cut(width, name):
    figure = Figure(figsize=(width, 6), layout="constrained")
    axes = figure.subplots()
    write_heading(figure, name, name)
    figure.draw_without_rendering()
    for text in figure.texts:
        extent = text.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.x1
        assert extent.y1 <= figure.bbox.y1
    first, second = (text.get_window_extent() for text in figure.texts)
    assert first.y0 > second.y0
    assert axes.get_tightbbox().y1 <= second.y0
    shown = "".join(figure.texts[1].get_text().replace("\\$", "$").split())
    assert shown == "".join(name.split())


@pytest.mark.parametrize("figsize", [None, (5.2, 4.2), (12.0, 5.0)])
@pytest.mark.parametrize("spread", [1.0, 1.3])
@pytest.mark.parametrize("ranks", [[8], list(range(1, 13))])
def test_nothing_in_a_figure_is_cut(figsize, spread, ranks):
    study = make_study(ranks, spread=spread, times=dict.fromkeys(ranks, (1.0, 2.0)), title="a long name " * 12)
    for name, figure in study_figures(study, log_scale=True, figsize=figsize).items():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= -0.02, name
        assert box.y0 >= -0.02, name
        assert box.x1 <= width + 0.02, name
        assert box.y1 <= height + 0.02, name


@pytest.mark.parametrize("loss_label", [MEAN_SQUARED_ERROR, "l1_loss"])
def test_the_unit_is_the_share_of_the_output_energy_wherever_it_is_known(loss_label):
    drawn = study_figures(make_study([2, 4], loss_label=loss_label))
    labels = {name: figure.axes[0].get_ylabel() for name, figure in drawn.items()}
    if loss_label == MEAN_SQUARED_ERROR:
        assert all(label.startswith("share of the output energy lost") for label in labels.values())
        assert set(labels) == {"loss_curves", "final_losses", "floor", "gap", "front"}
    else:
        assert labels == {"loss_curves": "l1_loss", "final_losses": "final l1_loss"}


def test_without_a_zero_predictor_losses_stay_as_they_are():
    assert not units_of(make_study([2], predict_zero_loss=None)).shares
    assert study_figures(make_study([2], predict_zero_loss=None))["loss_curves"].axes[0].get_ylabel() == (
        "mean squared error per output"
    )


def test_losses_on_held_out_inputs_are_shares_of_their_own_zero_predictor():
    study = make_study([2], held_out_predict_zero_loss=4.0)
    lines = [axes.lines[0].get_ydata()[-1] for axes in study_figures(study)["loss_curves"].axes]
    last = study.curves.iloc[-1]
    assert lines == [last["train_loss"] / 2.0, last["val_loss"] / 4.0]
