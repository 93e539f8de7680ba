"""Colours: of ranks, from dark to light, and of families; everything else follows matplotlib's style."""

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.colors import to_rgb

GREY = "0.5"  # legible on white and on black
# Okabe and Ito, without yellow and black, which white and black paper swallow.
FAMILY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
RANK_MAP = "plasma"
LIGHTEST = 0.66  # of the colour map on white; lighter lines have a contrast below 3 : 1


def ink() -> str:
    """Return the colour of texts in the style in use."""
    return rcParams["text.color"]


def paper() -> str:
    """Return the colour behind the data in the style in use."""
    return rcParams["axes.facecolor"]


def rank_colors(ranks) -> dict[int, tuple]:
    """Return a colour for each rank, from dark to light: readers who see no colour see the order."""
    ranks = sorted(ranks)
    start = 0.0 if sum(to_rgb(paper())) > 1.5 else 1.0 - LIGHTEST
    positions = start + (np.linspace(0.0, LIGHTEST, len(ranks)) if len(ranks) > 1 else np.array([0.3]))
    return {rank: colormaps[RANK_MAP](position) for rank, position in zip(ranks, positions)}
