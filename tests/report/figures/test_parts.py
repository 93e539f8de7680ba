from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from drawn_study import make_study
from matplotlib import colors as mpl_colors
from matplotlib.figure import Figure

from ks.report.figures.draw import UNHINTED, study_figures
from ks.report.figures.parts import PANEL_WIDTH, Sheet, label_ends, make_panels, rank_colors, set_log_axis

TIMES = {2: (1.0, 2.0), 4: (3.0, 2.0)}


def luminance(color):
    """Return the relative luminance of the contrast ratio of the Web Content Accessibility Guidelines."""
    channels = np.array(mpl_colors.to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("paper", ["white", "black"])
@pytest.mark.parametrize("count", [1, 12])
def test_colours_of_ranks_are_legible_and_ordered_in_lightness(count, paper):
    with matplotlib.rc_context({"axes.facecolor": paper}):
        shades = [luminance(color) for color in rank_colors([2**k for k in range(count)]).values()]
    assert all(later > earlier for earlier, later in pairwise(shades))
    behind = luminance(paper)
    assert all((max(shade, behind) + 0.05) / (min(shade, behind) + 0.05) >= 2.4 for shade in shades)


def test_a_style_of_the_user_is_honoured_in_every_figure():
    """Colours, fonts and sizes come from matplotlib's settings, as MATPLOTLIBRC or a matplotlibrc file sets them."""
    style = {"figure.facecolor": "#101010", "axes.facecolor": "#202020", "text.color": "#eeeeee", "font.size": 7}
    with matplotlib.rc_context(style | {"font.family": "monospace"}):
        drawn = study_figures(make_study([2, 4], spread=1.2, times=TIMES), log_scale=True)
    for name, figure in drawn.items():
        assert mpl_colors.to_hex(figure.get_facecolor()) == "#101010", name
        written = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
        assert {text.get_fontfamily()[0] for text in written} == {"monospace"}, name
        assert max(text.get_fontsize() for text in written) < 8, name
        assert mpl_colors.to_hex(figure.texts[0].get_color()) == "#eeeeee", name
        for axes in figure.axes:
            assert mpl_colors.to_hex(axes.get_facecolor()) == "#202020", name
            assert "#000000" not in {mpl_colors.to_hex(line.get_color()) for line in axes.lines}, name


@pytest.mark.parametrize(
    ("low", "high"), [(0.3, 0.31), (0.006, 1.0), (3e-9, 1.0), (1e-300, 1e300), (7.0, 7.0), (1.0, 512.0), (0.0, 1.0)]
)
def test_a_log_axis_has_a_few_ticks_whatever_its_range(low, high):
    axes = Figure().subplots()
    set_log_axis(axes.yaxis, low, high, "{:g}".format)
    bottom, top = axes.get_ylim()
    assert 2 <= sum(bottom <= tick <= top for tick in axes.get_yticks()) <= 12


@pytest.mark.parametrize("panels", [1, 3])
@pytest.mark.parametrize(
    "name", ["model.safetensors encoder.layer.0.output.dense.weight, 384 × 1536: monarch", "$five dollars " * 12,
             "encoder.layer.0.output.dense.weight." * 6],
)  # fmt: skip
def test_a_long_heading_wraps_and_is_never_cut(panels, name):
    figure = Sheet()
    axes = make_panels(figure, panels)[0]
    figure.arrange(name, name)
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


@pytest.mark.parametrize("font_size", [7, 11])
@pytest.mark.parametrize("ranks", [[8], list(range(1, 13))])
def test_nothing_in_a_figure_is_cut_and_every_panel_stays_in_its_part(font_size, ranks):
    study = make_study(ranks, spread=1.3, times=dict.fromkeys(ranks, (1.0, 2.0)), title="a long name " * 12)
    with matplotlib.rc_context({"font.size": font_size} | UNHINTED):  # as files are written
        drawn = study_figures(study, log_scale=True)
        for name, figure in drawn.items():
            figure.draw_without_rendering()
            width, height = figure.get_size_inches()
            inches, boxes = figure.dpi_scale_trans.inverted(), [(figure.get_tightbbox(), 0.0, 0.0, width, height)]
            for number, axes in enumerate(figure.axes):
                box, left = axes.get_tightbbox().transformed(inches), number * PANEL_WIDTH
                boxes.append((box, left, figure.below, left + PANEL_WIDTH, height - figure.above))
            for legend in figure.legends:
                boxes.append((legend.get_window_extent().transformed(inches), 0.0, 0.0, width, figure.below))
            for box, left, bottom, right, top in boxes:
                assert box.x0 >= left - 0.02, name
                assert box.y0 >= bottom - 0.02, name
                assert box.x1 <= right + 0.02, name
                assert box.y1 <= top + 0.02, name


@pytest.mark.parametrize("at", [np.full(12, 0.0), np.full(12, 1.0), np.linspace(0.5, 0.51, 12)])
def test_labels_of_lines_that_end_together_are_moved_apart_and_stay_beside_the_axes(at):
    axes = Figure().subplots()
    label_ends(axes, [(1.0, y, str(number), "black") for number, y in enumerate(at)])
    heights = [text.get_position()[1] for text in axes.texts[:-1]]
    assert sorted(heights) == heights
    assert min(np.diff(heights)) > 0.02
    assert 0 <= heights[0] < heights[-1] <= 1
