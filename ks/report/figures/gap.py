"""Distance to the floor by epoch: what more epochs can still gain."""

from matplotlib.figure import Figure

from ks.report.figures import parts
from ks.report.figures.colors import GREY, rank_colors
from ks.report.sentences import of_gaps
from ks.report.study import Study
from ks.report.units import losses_of, units_of
from ks.report.verdict import SMALL_EXCESS, Limit

LEAST = 1e-6  # a gap this small, as a fraction of the output energy, is drawn at the foot of a logarithmic axis


def has_gaps(study: Study) -> bool:
    """Return whether a rank has both a floor and population losses by epoch."""
    known = {"population_loss", "rank"} <= {*study.curves.columns} and units_of(study).relative
    floored = study.summary["rank"][study.summary["loss_floor_upper"].notna()]
    return known and bool(study.curves["population_loss"][study.curves["rank"].isin(floored)].notna().any())


def gap_by_epoch(study: Study, *, log_scale: bool = True, title: str | None = None, figsize=None) -> Figure:
    """Draw how far the population loss of each rank is above its floor after each epoch for which it is known.

    Where the floor is bracketed, the distance is that to the best known chain.

    Args:
        study: for which `has_gaps` holds.
        log_scale: taken for the signature of all figures; distances that shrink by decades need a logarithmic axis.
        title: below the finding.
        figsize: (width, height) in inches.
    """
    del log_scale
    figure = Figure(figsize=figsize or (8.5, 5), layout="constrained")
    axes = figure.subplots()
    units, summary = units_of(study), study.summary
    losses, colors = losses_of(study, units), rank_colors(summary["rank"])
    floors = losses.set_index("rank")["upper"].dropna()
    gaps = study.curves[["epoch", "rank", "population_loss"]].dropna()
    gaps = gaps[gaps["rank"].isin(floors.index)]
    gaps = gaps.assign(gap=gaps["population_loss"] / units.train - gaps["rank"].map(floors))
    means = gaps.groupby(["rank", "epoch"])["gap"].mean().clip(lower=LEAST)
    parts.finish_loss_axis(axes, units, [*means, SMALL_EXCESS / 5], log_scale=True)
    axes.axhspan(axes.get_ylim()[0], SMALL_EXCESS, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    axes.annotate(f"shaded: {Limit.SMALL}", (0.01, 0.02), xycoords="axes fraction", **parts.NOTE)
    ends = []
    for rank, line in means.groupby(level="rank"):
        line = line.droplevel("rank")
        axes.plot(line.index, line, "o-", color=colors[rank], linewidth=1.6, markersize=4)
        ends.append((line.index[-1], line.iloc[-1], str(rank), colors[rank]))
    parts.finish_epoch_axis(axes)
    parts.label_ends(axes, ends, "rank")
    bracketed = bool(losses["bracketed"].any())
    axes.set_ylabel(f"{units.label}, above\n{'the best known chain' if bracketed else 'the floor'} of the rank")
    parts.note_references(axes, log_scale=True)
    parts.write_heading(figure, of_gaps(losses, summary), title)
    return figure
