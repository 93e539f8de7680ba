"""Loss against the measured latency of inference, chain and dense beside each other."""

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ks.report.figures import parts
from ks.report.figures.colors import GREY, ink, rank_colors
from ks.report.sentences import of_latency
from ks.report.speed import measured_batches
from ks.report.study import Study
from ks.report.units import losses_of, units_of


def loss_by_latency(study: Study, *, log_scale: bool = False, title: str | None = None, figsize=None) -> Figure:
    """Draw the loss of every rank against the time of its forward pass, a panel for each batch size.

    Dense is a vertical line at the median of its times, which were measured in turn with each chain; a band is as wide
    as they differ.

    Args:
        study: with measured latencies.
        log_scale: logarithmic loss axis.
        title: below the finding.
        figsize: (width, height) in inches; a narrow figure has the panels one above the other, and
            becomes as high as they need.
    """
    batches, units = measured_batches(study.summary.to_dict("records")), units_of(study)
    figure = Figure(figsize=figsize or (1.5 + 3.5 * len(batches), 4.6), layout="constrained")
    panels = parts.make_panels(figure, len(batches))
    losses, colors = losses_of(study, units), rank_colors(study.summary["rank"])
    summary = study.summary.sort_values("rank").reset_index(drop=True)
    for axes, batch in zip(panels, batches):
        chain, dense = (summary[f"{kind}latency_ms_batch_{batch}"].astype(float) for kind in ("", "dense_"))
        parts.finish_loss_axis(axes, units, losses["best"].dropna(), log_scale=log_scale)
        shown = chain.notna() & losses["best"].notna()
        low, high = min(chain.min(), dense.min()), max(1.1 * chain.max(), 1.6 * dense.max())
        parts.set_log_axis(axes.xaxis, low / 1.1, high, "{:g}".format)
        axes.tick_params(axis="x", labelsize="small")
        axes.axvspan(dense.median(), axes.get_xlim()[1], color=GREY, alpha=0.1, linewidth=0, zorder=0)
        axes.axvspan(dense.min(), dense.max(), color=ink(), alpha=0.15, linewidth=0, zorder=1)
        axes.axvline(dense.median(), color=ink(), linewidth=1.4, zorder=1)
        parts.mark_ranks(axes, losses["rank"][shown], chain[shown], losses["best"][shown], colors)
        axes.annotate("slower\nthan dense", (0.99, 0.86), xycoords="axes fraction", ha="right", va="top", **parts.NOTE)
        axes.set_title(f"batch {batch} (dense: {dense.median():.3g} ms)", fontsize="medium", loc="left")
        axes.set_xlabel("milliseconds a forward pass")
        axes.set_ylabel(parts.literal(units.label))
        axes.tick_params(labelleft=True)
        if units.relative:
            parts.note_references(axes, log_scale=log_scale)
    handles: list[Artist] = [
        Line2D([], [], color=ink(), linewidth=1.4, label="dense, median"),
        Patch(color=ink(), alpha=0.15, label="dense, as measured beside each rank"),
        Line2D([], [], color=GREY, marker="o", linestyle="", label="trained (number: rank)"),
    ]
    parts.write_legend(figure, handles)
    parts.write_heading(figure, of_latency(summary.to_dict("records")), title)
    return figure
