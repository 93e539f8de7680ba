"""Colours: of ranks, from dark to light, and of families."""

import numpy as np
from matplotlib import colormaps

# Okabe and Ito, without the yellow, which white paper swallows.
FAMILY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vP*X"
LIGHTEST = 0.66  # of the colour map; lighter lines have a contrast below 3 : 1 on white


def rank_colors(ranks) -> dict[int, tuple]:
    """Return a colour for each rank, from dark to light: readers who see no colour see the order."""
    ranks = sorted(ranks)
    positions = np.linspace(0.0, LIGHTEST, len(ranks)) if len(ranks) > 1 else [0.3]
    return {rank: colormaps["plasma"](position) for rank, position in zip(ranks, positions)}
