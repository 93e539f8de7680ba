"""The columns of every table, each declared once: name, type, unit, form, description.

CSV and JSON files, the checks when they are read back, the tables in a terminal and in the report, and those of
docs/files.md are made from these declarations. A metric of train_with_random.py is a further column under its own name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from ks.errors import UsageError, one_line

Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Loss = Annotated[float, Meta(ge=0.0, le=1e300)]
Duration = Annotated[float, Meta(ge=0.0, le=1e12)]
Text = Annotated[str, Meta(max_length=10_000)]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    name: in files and in printed tables. type: of a value, with its range. description: for the documentation. unit: of
    the values, empty for counts and texts. form: format of a printed value. legend: the line below a printed table.
    plural: name of the column as a list in the JSON file of a run's curves. default: of a cell that is empty.
    """

    name: str
    type: Any
    description: str
    unit: str = ""
    form: str = "{}"
    legend: str = ""
    plural: str | None = None
    default: Any = None


def names(columns: Iterable[Column]) -> list[str]:
    return [column.name for column in columns]


def chosen(columns: Iterable[Column], order: Iterable[str]) -> list[Column]:
    """Return the columns of these names, in this order."""
    by_name = {column.name: column for column in columns}
    return [by_name[name] for name in order]


ISOTROPIC = "isotropic"  # kind of inputs, and name of the floors for them
BATCHES = (1, 32, 1024)  # batch sizes at which the latency of a chain is measured
LOSS = "unit of the losses"
FRACTION = "fraction of the zero predictor's loss"
INCREASE = "unit of the loss of the model, per token"

CURVES = (
    Column("epoch", Positive, "number of the epoch, from 1", plural="epochs"),
    Column("train_loss", Loss, "mean training loss over the steps of the epoch; it lags behind `val_loss` while the "
           "loss falls quickly", LOSS, plural="train_losses"),
    Column("val_loss", Loss, "loss on the validation samples at the end of the epoch", LOSS, plural="val_losses"),
    Column("rank", Positive, "rank of the chain", plural="rank"),
    Column("population_loss", Loss, "exact expected loss at the end of the epoch; computed about ten times a run, at "
           "the last and at the best epoch", LOSS, plural="population_losses"),
    Column("lr", float, "learning rate of the epoch's last step", plural="lrs"),
    Column("epoch_seconds", Duration, "duration of the epoch", "seconds", plural="epoch_seconds"),
    Column("segment", Positive, "number of the segment, from 1; more epochs for a finished run are a new segment",
           plural="segments", default=1),
    Column("grad_norm", float, "mean gradient norm over the steps, before clipping; only with `--log_grad_norm` or "
           "`--log_to`", plural="grad_norms"),
)  # fmt: skip

LATENCIES = tuple(
    Column(f"{kind}latency_ms_batch_{batch}", Duration, text.format(f"on {batch} inputs"), "milliseconds", "{:.3g}")
    for kind, text in (
        ("", "time of a forward pass of the chain {}, median of rounds after the run"),
        ("lowrank_", "time of a low-rank factorisation of the chain's size {}"),
        ("dense_", "time of W x {}, measured in turn with the chain"),
    )
    for batch in BATCHES
)

RANK = Column("rank", Positive, "rank of the chain")
SEED = Column("seed", Seed, "seed of samples and initial values")
SUMMARY = (
    RANK,
    Column("final_train_loss", Loss, "training loss of the last epoch", LOSS, "{:.4g}"),
    Column("final_val_loss", Loss, "validation loss of the last epoch", LOSS, "{:.4g}"),
    Column("min_train_loss", Loss, "lowest training loss of any epoch", LOSS, "{:.4g}"),
    Column("min_val_loss", Loss, "lowest validation loss of any epoch", LOSS, "{:.4g}"),
    Column("min_train_epoch", Count, "epoch of the lowest training loss", form="{:.0f}"),
    Column("min_val_epoch", Count, "epoch of the lowest validation loss", form="{:.0f}"),
    Column("num_epochs", Count, "number of epochs trained", form="{:.0f}"),
    Column("status", Text, "`ok`, or why the run failed; its final losses are then empty"),
    Column("population_loss", Loss, "exact expected loss of the last epoch's chain", LOSS, "{:.4g}"),
    Column("loss_floor", Loss, "lower bound: no chain of this rank has a smaller loss", LOSS, "{:.4g}",
           "no chain of the rank can have a smaller loss"),
    Column("loss_floor_upper", Loss, "upper bound: the best known chain of this rank has this loss; where the bounds "
           "differ, a run may beat it", LOSS, "{:.4g}",
           "where the floor lies between two bounds, the loss of the best chain known"),
    Column("loss_floor_is_exact", bool, "whether the two bounds are equal up to rounding, so that the floor is the "
           "optimum of the rank"),
    Column("optimality_gap", Number, "`population_loss` / `loss_floor_upper` − 1, negative for a loss below that of "
           "the best known chain; empty if that is below 1e-6 of the zero predictor's", "ratio", "{:.2%}"),
    Column("excess", Number, "(`population_loss` − `loss_floor_upper`) / loss of the zero predictor", FRACTION,
           "{:.3%}"),
    Column("relative_loss", Loss, "`population_loss` / loss of the zero predictor: 0 is dense, 1 is useless; the "
           "fraction of the output energy that is lost under the given inputs, unless `loss_metric` is `model_loss`",
           FRACTION, "{:.2%}",
           "the fraction of the output energy that is lost, 100% for the zero predictor"),
    Column("parameters", Positive, "free values of the chain", form="{:,.0f}"),
    Column("compression_ratio", Loss, "parameters of the dense weight over those of the chain", "ratio", "{:.2f}"),
    Column("saturated", bool, "whether the rank is so large that a larger one changes nothing"),
    Column("verdict", Text, "limit of this rank: converged, between its bounds, within 0.1% of the energy (with "
           "`model_loss`, of the zero predictor's loss), sample-limited or undertrained; and the marks saturated, "
           "larger than dense, better than the best known chain and calibration-limited (the loss on held-out inputs "
           "is larger)"),
    Column("num_seeds", Count, "number of seeds that finished", form="{:.0f}"),
    Column("final_train_loss_se", Loss, "standard error of `final_train_loss` over the seeds", LOSS, "{:.2g}"),
    Column("final_val_loss_se", Loss, "standard error of `final_val_loss` over the seeds", LOSS, "{:.2g}"),
    Column("population_loss_se", Loss, "standard error of `population_loss` over the seeds", LOSS, "{:.2g}"),
    Column("train_seconds", Duration, "duration of the run without the start of its process; a resumed run counts all "
           "its parts", "seconds", "{:.1f}"),
    Column("removed_share", Number, "(loss of the zero predictor − `population_loss`) / (loss of the zero predictor − "
           "`loss_floor_upper`); above 1 if the run beats the best known chain", "ratio", "{:.2%}"),
    Column("held_out_relative_loss", Loss, "with measured inputs: relative loss on the held-out inputs", FRACTION,
           "{:.2%}"),
    Column("isotropic_floor", Loss, "floor for isotropic inputs, for comparison with the floor for the measured ones",
           FRACTION, "{:.2%}"),
    Column("segments", Text, "epochs of each segment of the run, joined by +"),
    Column("relative_floor", Loss, "`loss_floor` / loss of the zero predictor", FRACTION, "{:.2%}",
           "no chain of the rank can lose less"),
    Column("relative_floor_upper", Loss, "`loss_floor_upper` / loss of the zero predictor", FRACTION, "{:.2%}",
           "where the floor lies between two bounds, the loss of the best chain known"),
    Column("relative_loss_se", Loss, "standard error of `relative_loss` over the seeds", FRACTION, "{:.3%}"),
    Column("share_of_dense", Loss, "parameters of the chain over those of the dense weight", "ratio", "{:.2%}"),
    Column("predict_zero_loss", Loss, "loss of the zero predictor", LOSS, "{:.4g}"),
    Column("target_relative_loss", Loss, "`--target_relative_loss`, or `--target_loss_increase` over the loss of the "
           "zero predictor", FRACTION, "{:.2%}"),
    Column("reached_target", bool, "whether the rank is finished and `relative_loss` is at most the target"),
    Column("criterion", Text, "criterion of the runs: `mean_squared_error`, or another one, whose losses are those of "
           "outputs in units of the root mean square of W x"),
    Column("weight", Text, "name of the weight's file"),
    Column("weight_key", Text, "name of the weight in its file"),
    Column("weight_sha256", Text, "hash of shape, dtype and values of the weight"),
    Column("chain", Text, "family of chains, with its splits"),
    Column("inputs", Text, "`isotropic`, or `measured` and the hash of the inputs"),
    *LATENCIES,
    Column("loss_metric", Text, "`--loss_metric` of the study: losses are those of the outputs with `output_energy`, "
           "and increases of the loss of the model with `model_loss`"),
    Column("loss_unit", Text, "unit of the loss of the model, as `nats`; empty without gradients in `--inputs`"),
    Column("loss_increase", Loss, "with gradients in `--inputs`: ½ tr(G (W − Ŵ) C (W − Ŵ)ᵀ), the increase of the loss "
           "of the model that is predicted to second order, whichever metric trained", INCREASE, "{:.3g}",
           "the predicted increase of the loss of the model"),
    Column("held_out_loss_increase", Loss, "`loss_increase` with the moments of the held-out part", INCREASE, "{:.3g}"),
    Column("energy_loss", Loss, "with gradients in `--inputs`: fraction of the output energy that is lost, whichever "
           "metric trained", "ratio", "{:.2%}", "the fraction of the output energy that is lost"),
)  # fmt: skip

# The order of the printed summary: the columns that decide come first, and --verbose adds the details.
PRINTED = (
    *("rank", "relative_loss", "relative_loss_se", "held_out_relative_loss", "loss_increase", "relative_floor"),
    *("relative_floor_upper", "optimality_gap", "share_of_dense", "status", "verdict"),
)
DETAILS = (
    *("parameters", "compression_ratio", "final_train_loss", "final_val_loss", "population_loss", "loss_floor"),
    *("loss_floor_upper", "held_out_loss_increase", "excess", "removed_share", "isotropic_floor", "min_val_epoch"),
    *("num_epochs", "segments", "train_seconds"),
)
# The order of the results of several layers.
PRINTED_LAYERS = (
    *("weight_key", "rank", "relative_loss", "relative_floor_upper", "loss_increase", "share_of_dense"),
    *("status", "verdict"),
)
# With --loss_metric model_loss, the columns in their place: all losses are increases in its unit.
INCREASE_FOR = {
    "relative_loss": "loss_increase",
    "relative_loss_se": "population_loss_se",
    "held_out_relative_loss": "held_out_loss_increase",
    "loss_increase": "energy_loss",  # the other metric
    "relative_floor": "loss_floor",
    "relative_floor_upper": "loss_floor_upper",
    "lowrank_floor": "lowrank_floor",  # of `PLANNED_RANKS`
}

EFFECTS = ("loss_increase", "held_out_loss_increase", "energy_loss")  # on the model, at the end of a run
RUNS = (RANK, SEED, *SUMMARY[1:10], *chosen(SUMMARY, ("train_seconds", "segments", *EFFECTS)))

ALL_CURVES = (
    RANK,
    SEED,
    Column("epoch", Positive, "number of the epoch, from 1"),
    Column("split", Text, "`train`, `validation` or `population`; the last one in epochs for which it is known"),
    Column("loss", Loss, "loss of the rank and seed on this split", LOSS),
    Column("lr", float, "learning rate of the epoch's last step"),
    Column("seconds", Duration, "duration of the epoch", "seconds"),
)

FLOOR = (
    Column("chain", Text, "family of the chain; `lowrank` rows are for comparison, and so are `isotropic` rows, which "
           "hold the floors for isotropic inputs if the inputs were measured"),
    *chosen(SUMMARY, ("rank", "parameters")),
    Column("loss_floor", Loss, "lower bound: no chain of this rank has a smaller loss", LOSS),
    Column("relative_loss", Loss, "`loss_floor` / loss of the zero predictor", FRACTION),
)  # fmt: skip

# What --dry_run prints; no file holds it.
PLANNED_RANKS = (
    *chosen(SUMMARY, ("rank", "relative_floor", "relative_floor_upper", "loss_floor", "loss_floor_upper")),
    Column("lowrank_floor", Loss, "floor of low-rank with at most as many parameters", FRACTION, "{:.2%}",
           "the same for a low-rank factorisation of at most that size, whose rank is lowrank_rank"),
    Column("lowrank_rank", Count, "rank of that low-rank factorisation", form="{:.0f}"),
    *chosen(SUMMARY, ("isotropic_floor", "parameters", "share_of_dense")),
    Column("remarks", Text, "saturated, larger than dense"),
)  # fmt: skip
FAMILIES = (
    Column("chain", Text, "family of chains"),
    *chosen(SUMMARY, ("rank", "parameters", "share_of_dense", "relative_loss", "loss_increase")),
    Column("none_below", Positive, "rank below which none can reach the target", legend="no smaller rank can reach the "
           "target"),
)  # fmt: skip
PATTERNS = (RANK, Column("patterns", Text, "patterns (a, b, c, d) of the factors of each rank"))

LAYER = (
    Column("layer", Text, "name of the weight in the checkpoint"),
    Column("rows", Positive, "m, output features"),
    Column("cols", Positive, "n, input features"),
)
LAYER_LOSSES = (
    Column("loss_increase", Loss, "predicted increase of the loss of the model by the best known chain of this rank; "
           "only with gradients in the inputs", INCREASE, "{:.3g}",
           "predicted increase of the loss of the model, per token"),
    Column("loss_increase_lower", Loss, "lower bound on `loss_increase` of every chain of this rank; empty if the plan "
           "minimises the output energy", INCREASE, "{:.4g}"),
    Column("relative_loss", Loss, "fraction of the output energy that the best known chain of this rank loses",
           FRACTION, "{:.2%}", "the fraction of the output energy that is lost"),
    Column("relative_loss_lower", Loss, "lower bound on `relative_loss` of every chain of this rank; empty if the plan "
           "minimises the loss of the model", FRACTION, "{:.2%}"),
    Column("interpolated", bool, "whether both losses were interpolated between ranks"),
)  # fmt: skip
LAYER_FLOORS = (
    *LAYER,
    Column("chain", Text, "family of the chain"),
    RANK,
    Column("parameters", Positive, "values of the chain"),
    Column("share", Loss, "`parameters` / (m·n)", "ratio"),
    *LAYER_LOSSES,
)
PLAN = (
    *LAYER,
    Column("chain", Text, "family of the chain, or `dense` if the weight stays as it is"),
    Column("rank", Positive, "rank of the chain; empty for dense", form="{:.0f}"),
    Column("parameters", Positive, "values of the chain, or m·n for dense; biases are not counted",
           form="{:,.0f}"),
    Column("dense_parameters", Positive, "m·n"),
    Column("share", Loss, "`parameters` / `dense_parameters`", "ratio", "{:.1%}"),
    *LAYER_LOSSES,
    Column("shared_with", Text, "names of weights that are tied to this one, separated by spaces; they count once"),
)  # fmt: skip

# Of the reports of several studies and of checkpoints, which no file but the page holds.
TRAINED_LAYERS = (
    *chosen(PLAN, ("layer", "chain", "rank", "share")),
    Column("planned_increase", Loss, "predicted increase of the loss of the model by the best known chain of this rank",
           INCREASE, "{:.3g}"),
    Column("trained_increase", Loss, "the same, by the chain that was trained", INCREASE, "{:.3g}"),
    Column("planned_energy_loss", Loss, "fraction of the output energy that the best known chain of this rank loses",
           "ratio", "{:.2%}"),
    Column("trained_energy_loss", Loss, "the same, of the chain that was trained", "ratio", "{:.2%}"),
    *chosen(SUMMARY, ("status", "verdict", "train_seconds")),
)  # fmt: skip
MEASURED_PLANS = (
    Column("plan", Text, "file of the plan"),
    *chosen(PLAN, ("share",)),
    Column("predicted_increase", Loss, "increase of the loss of the model that the plan predicts", INCREASE, "{:.3g}"),
    Column("measured_increase", Number, "increase that was measured on the compressed model", INCREASE, "{:.3g}"),
    Column("measured_over_predicted", Number, "ratio of both", "ratio", "{:.2f}"),
)  # fmt: skip
STUDIES = (
    Column("study", Text, "name of the results folder"),
    Column("target", Text, "target of the study, and whether a finished rank reaches it"),
    Column("rank", Positive, "smallest rank that reaches the target; otherwise the rank that the answer of the study "
           "is about", form="{:.0f}"),
    *chosen(SUMMARY, ("share_of_dense",)),
    Column("relative_loss", Loss, "loss of this rank over that of the zero predictor on the same weight and inputs",
           FRACTION, "{:.2%}"),
    *chosen(SUMMARY, ("energy_loss", "loss_increase")),
    Column("layer", Text, "name of the weight in its file"),
    *chosen(SUMMARY, ("chain", "inputs")),
    Column("loss", Text, "the loss that the runs minimise"),
    Column("seeds", Text, "seeds of the runs"),
)  # fmt: skip
STUDIES_RUNS = (
    STUDIES[0],
    Column("machine", Text, "hosts of the runs, their devices and CPU threads"),
    Column("runs", Text, "how the runs ended"),
    Column("verdicts", Text, "ranks of each verdict"),
    Column("train_seconds", Duration, "duration of all runs without the start of their processes", "seconds",
           "{:.1f}"),
    Column("longest_run", Text, "rank and seconds of the longest run"),
)  # fmt: skip

METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
LONGEST = 100  # characters: the name of a metric is part of the name of a figure's file
FINAL, BEST = "final_", "best_"  # of a metric's two columns in the summary and in the runs
TAKEN = {
    *names([*CURVES, *ALL_CURVES]),
    *(column.plural for column in CURVES),
    *(name.removeprefix(FINAL) for name in names([*SUMMARY, *RUNS]) if name.startswith(FINAL)),
}


def metric_names(rows: Iterable[Mapping[str, Any]], declared: Iterable[Column] = CURVES) -> list[str]:
    """Return the names in rows that are not declared columns, in the order of first appearance."""
    known = {*names(declared)}
    return list(dict.fromkeys(name for row in rows for name in row if name not in known))


def summary_metrics(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics' columns in rows of the summary or of the runs."""
    return [name for name in metric_names(rows, SUMMARY) if name.startswith((FINAL, BEST))]


def metric_columns(names: Iterable[str], type: Any = Number) -> tuple[Column, ...]:
    """Return a column for each name that is well-formed."""
    return tuple(Column(name, type, "metric", form="{:.4g}") for name in names if METRIC.fullmatch(name))


def check_metric_names(metrics: Iterable[Any]) -> None:
    """Check that metrics can be columns beside ours in every table that holds them.

    Raises:
        UsageError: a name is malformed or taken.
    """
    for name in metrics:
        shown = repr(one_line(name, 60))
        if not isinstance(name, str) or not METRIC.fullmatch(name) or len(name) > LONGEST:
            rule = f"a letter or _ first, then letters, digits, _ . or -, at most {LONGEST} characters"
            raise UsageError(f"{shown} cannot name a metric: a name has {rule}")
        if name in TAKEN:
            raise UsageError(f"{shown} cannot name a metric: the tables have such a column; choose another name")
