"""The columns of every table on disk, each declared once: name, type, meaning, unit, and how a terminal shows it.

CSV and JSON files, the checks when they are read back, the printed tables and the tables of docs/files.md are made from
these declarations. A metric of train_with_random.py is a further column under its own name.
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
    """One column.

    name: in CSV, JSON and printed tables. type: of a value, with its range. meaning: for the documentation. unit: of
    the values, empty for counts and texts. header: another name in a printed table. form: format of a printed value.
    plural: name of the column as a list in the JSON file of a run's curves. default: of a cell that is empty.
    """

    name: str
    type: Any
    meaning: str
    unit: str = ""
    header: str | None = None
    form: str = "{}"
    plural: str | None = None
    default: Any = None


def names(columns: Iterable[Column]) -> list[str]:
    return [column.name for column in columns]


ISOTROPIC = "isotropic"  # kind of inputs, and name of the floors for them
BATCHES = (1, 32, 1024)  # batch sizes at which the latency of a chain is measured
LOSS = "squared unit of the outputs"
SHARE = "share of the loss of predicting 0"

CURVES = (
    Column("epoch", Positive, "number of the epoch, from 1", plural="epochs"),
    Column("train_loss", Loss, "mean training loss over the steps of the epoch; it lags behind `val_loss` while the "
           "loss falls quickly", LOSS, plural="train_losses"),
    Column("val_loss", Loss, "loss on the validation samples at the end of the epoch", LOSS, plural="val_losses"),
    Column("rank", Positive, "rank of the chain", plural="rank"),
    Column("population_loss", Loss, "exact expected loss at the end of the epoch; known about ten times a run, at the "
           "last and at the best epoch", LOSS, plural="population_losses"),
    Column("lr", float, "learning rate of the epoch's last step", plural="lrs"),
    Column("epoch_seconds", Duration, "duration of the epoch", "seconds", plural="epoch_seconds"),
    Column("segment", Positive, "number of the segment, from 1; more epochs for a finished training are a new one",
           plural="segments", default=1),
    Column("grad_norm", float, "mean gradient norm over the steps, before clipping; only with `--log_grad_norm` or "
           "`--log_to`",
           plural="grad_norms"),
)  # fmt: skip

LATENCIES = (
    *(Column(f"latency_ms_batch_{batch}", Duration, f"time of a forward pass of the chain on {batch} inputs, median of "
             "rounds after the training", "milliseconds") for batch in BATCHES),
    *(Column(f"lowrank_latency_ms_batch_{batch}", Duration, f"time of plain low-rank of the chain's size on {batch} "
             "inputs", "milliseconds") for batch in BATCHES),
    *(Column(f"dense_latency_ms_batch_{batch}", Duration, f"time of W x on {batch} inputs, measured in turn with the "
             "chain", "milliseconds") for batch in BATCHES),
)  # fmt: skip

SUMMARY = (
    Column("rank", Positive, "rank of the chain"),
    Column("final_train_loss", Loss, "training loss of the last epoch", LOSS, form="{:.4g}"),
    Column("final_val_loss", Loss, "validation loss of the last epoch", LOSS, form="{:.4g}"),
    Column("min_train_loss", Loss, "lowest training loss of any epoch", LOSS),
    Column("min_val_loss", Loss, "lowest validation loss of any epoch", LOSS),
    Column("min_train_epoch", Count, "epoch of the lowest training loss"),
    Column("min_val_epoch", Count, "epoch of the lowest validation loss", form="{:.0f}"),
    Column("num_epochs", Count, "number of epochs trained", form="{:.0f}"),
    Column("status", Text, "`ok`, or why the training failed; its final losses are then empty"),
    Column("population_loss", Loss, "exact expected loss of the last epoch's chain", LOSS, form="{:.4g}"),
    Column("loss_floor", Loss, "lower bound: no chain of this rank has a smaller loss", LOSS, form="{:.4g}"),
    Column("loss_floor_upper", Loss, "upper bound: the best known chain of this rank has this loss; where the bounds "
           "differ, training may beat it", LOSS, form="{:.4g}"),
    Column("loss_floor_is_exact", bool, "whether the two bounds are equal, so that the floor is the optimum of the "
           "rank"),
    Column("optimality_gap", Number, "`population_loss` / `loss_floor_upper` − 1, negative below the best known chain; "
           "empty if that is below 1e-6 of predicting 0", "ratio", form="{:.2%}"),
    Column("excess", Number, "(`population_loss` − `loss_floor_upper`) / loss of predicting 0", SHARE, form="{:.3%}"),
    Column("relative_loss", Loss, "share of the output energy lost, `population_loss` / loss of predicting 0, under "
           "the given inputs; 1 is useless, 0 is exact", SHARE, form="{:.2%}"),
    Column("parameters", Positive, "free values of the chain", form="{:.0f}"),
    Column("compression_ratio", Loss, "parameters of the dense weight over those of the chain", "ratio", form="{:.2f}"),
    Column("saturated", bool, "whether the rank is so large that a larger one changes nothing"),
    Column("verdict", Text, "limit of this rank: converged, between its bounds, within 0.1% of the energy, "
           "sample-limited or undertrained; and the marks saturated, larger than dense, better than the best known "
           "chain and calibration-limited (unseen inputs lose more)"),
    Column("num_seeds", Count, "number of seeds that finished"),
    Column("final_train_loss_se", Loss, "standard error of `final_train_loss` over the seeds", LOSS),
    Column("final_val_loss_se", Loss, "standard error of `final_val_loss` over the seeds", LOSS),
    Column("population_loss_se", Loss, "standard error of `population_loss` over the seeds", LOSS),
    Column("train_seconds", Duration, "duration of the training without the start of its process; a resumed training "
           "counts all its parts", "seconds", form="{:.1f}"),
    Column("removed_share", Number, "(loss of predicting 0 − `population_loss`) / (loss of predicting 0 − "
           "`loss_floor_upper`); above 1 if training beats the best known chain", "ratio", form="{:.2%}"),
    Column("held_out_relative_loss", Loss, "with measured inputs: share of the output energy of the held-out inputs "
           "that is lost", SHARE, form="{:.2%}"),
    Column("isotropic_floor", Loss, "floor for isotropic inputs, for comparison with the floor for the measured ones",
           SHARE, form="{:.2%}"),
    Column("segments", Text, "epochs of each segment of the training, joined by +"),
    Column("relative_floor", Loss, "`loss_floor` / loss of predicting 0", SHARE, form="{:.2%}"),
    Column("relative_floor_upper", Loss, "`loss_floor_upper` / loss of predicting 0", SHARE, form="{:.2%}"),
    Column("relative_loss_se", Loss, "standard error of `relative_loss` over the seeds", SHARE, form="{:.3%}"),
    Column("share_of_dense", Loss, "parameters of the chain over those of the dense weight", "ratio", form="{:.2%}"),
    Column("predict_zero_loss", Loss, "loss of predicting 0", LOSS, form="{:.4g}"),
    Column("target_relative_loss", Loss, "`--target_relative_loss`", SHARE),
    Column("reached_target", bool, "whether the rank is finished and `relative_loss` is at most the target"),
    Column("criterion", Text, "what trained: `mean_squared_error`, or another criterion, whose losses are those of "
           "outputs in units of the root mean square of W x"),
    Column("weight", Text, "name of the weight's file"),
    Column("weight_key", Text, "name of the weight in its file"),
    Column("weight_sha256", Text, "hash of shape, dtype and values of the weight"),
    Column("chain", Text, "family of chains, with its splits"),
    Column("inputs", Text, "`isotropic`, or `measured` and the hash of the inputs"),
    *LATENCIES,
)  # fmt: skip

# The printed table has its own order: what decides comes first, and the details follow with --verbose.
PRINTED = (
    *("rank", "relative_loss", "relative_loss_se", "held_out_relative_loss", "relative_floor", "relative_floor_upper"),
    *("optimality_gap", "share_of_dense", "status", "verdict"),
)
DETAILS = (
    *("parameters", "compression_ratio", "final_train_loss", "final_val_loss", "population_loss", "loss_floor"),
    *("loss_floor_upper", "excess", "removed_share", "isotropic_floor", "min_val_epoch", "num_epochs", "segments"),
    "train_seconds",
)

RUNS = (
    Column("rank", Positive, "rank of the chain"),
    Column("seed", Seed, "seed of samples and initial values"),
    *SUMMARY[1:10],
    Column("train_seconds", Duration, "duration of the training without the start of its process", "seconds"),
    Column("segments", Text, "epochs of each segment of the training, joined by +"),
)

ALL_CURVES = (
    Column("rank", Positive, "rank of the chain"),
    Column("seed", Seed, "seed of samples and initial values"),
    Column("epoch", Positive, "number of the epoch, from 1"),
    Column("split", Text, "`train`, `validation` or `population`; the last one in epochs for which it is known"),
    Column("loss", Loss, "loss of the rank and seed on this split", LOSS),
    Column("lr", float, "learning rate of the epoch's last step"),
    Column("seconds", Duration, "duration of the epoch", "seconds"),
)

FLOOR = (
    Column(
        "chain",
        Text,
        "family of the chain; `lowrank` rows are for comparison, and so are `isotropic` ones, the floors of "
        "the chain for isotropic inputs, if the inputs were measured",
    ),
    Column("rank", Positive, "rank of the chain"),
    Column("parameters", Positive, "free values of the chain"),
    Column("loss_floor", Loss, "lower bound: no chain of this rank has a smaller loss", LOSS),
    Column("relative_loss", Loss, "`loss_floor` / loss of predicting 0", SHARE),
)

LAYER_FLOORS = (
    Column("layer", Text, "name of the weight in the checkpoint"),
    Column("rows", Positive, "m, output features"),
    Column("cols", Positive, "n, input features"),
    Column("chain", Text, "family of the chain"),
    Column("rank", Positive, "rank of the chain"),
    Column("parameters", Positive, "values of the chain"),
    Column("share", Loss, "`parameters` / (m·n)", "ratio"),
    Column("relative_loss", Loss, "share of the output energy that the best known chain of this rank loses", SHARE),
    Column("relative_loss_lower", Loss, "share that every chain of this rank loses at least", SHARE),
    Column("interpolated", bool, "whether `relative_loss` was interpolated between ranks"),
)  # fmt: skip
PLAN = (
    Column("layer", Text, "name of the weight in the checkpoint", header="layer"),
    Column("rows", Positive, "m, output features", header="rows"),
    Column("cols", Positive, "n, input features", header="columns"),
    Column("chain", Text, "family of the chain, or `dense` if the weight stays as it is", header="chain"),
    Column("rank", Positive, "rank of the chain; empty for dense", header="rank", form="{:.0f}"),
    Column("parameters", Positive, "values of the chain, or m·n for dense; biases are not counted",
           header="parameters"),
    Column("dense_parameters", Positive, "m·n"),
    Column("share", Loss, "`parameters` / `dense_parameters`", "ratio", "share", "{:.1%}"),
    Column("relative_loss", Loss, "share of the output energy that the best known chain loses", SHARE, "energy lost",
           "{:.2%}"),
    Column("relative_loss_lower", Loss, "share that every chain of this rank loses at least", SHARE, "at least",
           "{:.2%}"),
    Column("interpolated", bool, "whether `relative_loss` was interpolated between ranks"),
    Column("shared_with", Text, "names of weights that are tied to this one, separated by spaces; they count once"),
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
    return tuple(Column(name, type, "a metric", form="{:.4g}") for name in names if METRIC.fullmatch(name))


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
