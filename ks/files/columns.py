"""The columns of every table on disk, each declared once: name, meaning, unit, and how a terminal shows it.

CSV and JSON files, the printed tables and the tables of docs/files.md are made from these declarations.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column.

    name: in CSV, JSON and printed tables. meaning: for the documentation. unit: of the values, empty for counts and
    texts. header: another name in a printed table. form: format of a printed value. plural: name of the column as a
    list in the JSON file of a run's curves.
    """

    name: str
    meaning: str
    unit: str = ""
    header: str | None = None
    form: str = "{}"
    plural: str | None = None


def names(columns: Iterable[Column]) -> list[str]:
    return [column.name for column in columns]


ISOTROPIC = "isotropic"  # kind of inputs, and name of the floors for them
BATCHES = (1, 32, 1024)  # batch sizes at which the latency of a chain is measured
LOSS = "squared unit of the outputs"
SHARE = "share of the loss of predicting 0"

CURVES = (
    Column("epoch", "number of the epoch, from 1", plural="epochs"),
    Column("train_loss", "mean training loss over the steps of the epoch; it lags behind `val_loss` while the loss "
           "falls quickly", LOSS, plural="train_losses"),
    Column("val_loss", "loss on the validation samples at the end of the epoch", LOSS, plural="val_losses"),
    Column("rank", "rank of the chain", plural="rank"),
    Column("population_loss", "exact expected loss at the end of the epoch; known about ten times a run, at the last "
           "and at the best epoch", LOSS, plural="population_losses"),
    Column("lr", "learning rate of the epoch's last step", plural="lrs"),
    Column("epoch_seconds", "duration of the epoch", "seconds", plural="epoch_seconds"),
    Column("segment", "number of the segment, from 1; more epochs for a finished training are a new one",
           plural="segments"),
    Column("grad_norm", "mean gradient norm over the steps, before clipping; only with `--log_grad_norm` or "
           "`--log_to`",
           plural="grad_norms"),
)  # fmt: skip

LATENCIES = (
    *(Column(f"latency_ms_batch_{batch}", f"time of a forward pass of the chain on {batch} inputs, median of rounds "
             "after the training", "milliseconds") for batch in BATCHES),
    *(Column(f"lowrank_latency_ms_batch_{batch}", f"time of plain low-rank of the chain's size on {batch} inputs",
             "milliseconds") for batch in BATCHES),
    *(Column(f"dense_latency_ms_batch_{batch}", f"time of W x on {batch} inputs, measured in turn with the chain",
             "milliseconds") for batch in BATCHES),
)  # fmt: skip

SUMMARY = (
    Column("rank", "rank of the chain"),
    Column("final_train_loss", "training loss of the last epoch", LOSS, form="{:.4g}"),
    Column("final_val_loss", "validation loss of the last epoch", LOSS, form="{:.4g}"),
    Column("min_train_loss", "lowest training loss of any epoch", LOSS),
    Column("min_val_loss", "lowest validation loss of any epoch", LOSS),
    Column("min_train_epoch", "epoch of the lowest training loss"),
    Column("min_val_epoch", "epoch of the lowest validation loss", form="{:.0f}"),
    Column("num_epochs", "number of epochs trained", form="{:.0f}"),
    Column("status", "`ok`, or why the training failed; its final losses are then empty"),
    Column("population_loss", "exact expected loss of the last epoch's chain", LOSS, form="{:.4g}"),
    Column("loss_floor", "lower bound: no chain of this rank has a smaller loss", LOSS, form="{:.4g}"),
    Column("loss_floor_upper", "upper bound: the best known chain of this rank has this loss; where the bounds differ, "
           "training may beat it", LOSS, form="{:.4g}"),
    Column("loss_floor_is_exact", "whether the two bounds are equal, so that the floor is the optimum of the rank"),
    Column("optimality_gap", "`population_loss` / `loss_floor_upper` − 1, negative below the best known chain; empty "
           "if that is below 1e-6 of predicting 0", "ratio", form="{:.2%}"),
    Column("excess", "(`population_loss` − `loss_floor_upper`) / loss of predicting 0", SHARE, form="{:.3%}"),
    Column("relative_loss", "share of the output energy lost, `population_loss` / loss of predicting 0, under the "
           "given inputs; 1 is useless, 0 is exact", SHARE, form="{:.2%}"),
    Column("parameters", "free values of the chain", form="{:.0f}"),
    Column("compression_ratio", "parameters of the dense weight over those of the chain", "ratio", form="{:.2f}"),
    Column("saturated", "whether the rank is so large that a larger one changes nothing"),
    Column("verdict", "limit of this rank: converged, between its bounds, sample-limited or undertrained; and the "
           "marks saturated, larger than dense, below the best known (chain) and calibration-limited (unseen inputs "
           "lose more)"),
    Column("num_seeds", "number of seeds that finished"),
    Column("final_train_loss_se", "standard error of `final_train_loss` over the seeds", LOSS),
    Column("final_val_loss_se", "standard error of `final_val_loss` over the seeds", LOSS),
    Column("population_loss_se", "standard error of `population_loss` over the seeds", LOSS),
    Column("train_seconds", "duration of the training without the start of its process; a resumed training counts all "
           "its parts", "seconds", form="{:.1f}"),
    Column("removed_share", "(loss of predicting 0 − `population_loss`) / (loss of predicting 0 − `loss_floor_upper`); "
           "above 1 if training beats the best known chain", "ratio", form="{:.2%}"),
    Column("held_out_relative_loss", "with measured inputs: share of the output energy of the held-out inputs that is "
           "lost", SHARE, form="{:.2%}"),
    Column("isotropic_floor", "with measured inputs: the floor that isotropic inputs would have; the two say how much "
           "the inputs change", SHARE, form="{:.2%}"),
    Column("segments", "epochs of each segment of the training, joined by +"),
    Column("relative_floor", "`loss_floor` / loss of predicting 0", SHARE, form="{:.2%}"),
    Column("relative_floor_upper", "`loss_floor_upper` / loss of predicting 0", SHARE, form="{:.2%}"),
    Column("relative_loss_se", "standard error of `relative_loss` over the seeds", SHARE, form="{:.3%}"),
    Column("share_of_dense", "parameters of the chain over those of the dense weight", "ratio", form="{:.2%}"),
    Column("predict_zero_loss", "loss of predicting 0", LOSS, form="{:.4g}"),
    Column("target_relative_loss", "`--target_relative_loss`", SHARE),
    Column("reached_target", "whether the rank is finished and `relative_loss` is at most the target"),
    Column("weight", "name of the weight's file"),
    Column("weight_key", "name of the weight in its file"),
    Column("weight_sha256", "hash of shape, dtype and values of the weight"),
    Column("chain", "family of chains, with its splits"),
    Column("inputs", "`isotropic`, or `measured` and the hash of the inputs"),
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
    Column("rank", "rank of the chain"),
    Column("seed", "seed of samples and initial values"),
    *SUMMARY[1:10],
    Column("train_seconds", "duration of the training without the start of its process", "seconds"),
    Column("segments", "epochs of each segment of the training, joined by +"),
)

ALL_CURVES = (
    Column("rank", "rank of the chain"),
    Column("seed", "seed of samples and initial values"),
    Column("epoch", "number of the epoch, from 1"),
    Column("split", "`train`, `validation` or `population`; the last one in epochs for which it is known"),
    Column("loss", "loss of the rank and seed on this split", LOSS),
    Column("lr", "learning rate of the epoch's last step"),
    Column("seconds", "duration of the epoch", "seconds"),
)

FLOOR = (
    Column(
        "chain",
        "family of the chain; `lowrank` rows are for comparison, and so are `isotropic` ones, the floors of "
        "the chain for isotropic inputs, if the inputs were measured",
    ),
    Column("rank", "rank of the chain"),
    Column("parameters", "free values of the chain"),
    Column("loss_floor", "lower bound: no chain of this rank has a smaller loss", LOSS),
    Column("relative_loss", "`loss_floor` / loss of predicting 0", SHARE),
)

LAYER_FLOORS = (
    Column("layer", "name of the weight in the checkpoint"),
    Column("rows", "m, output features"),
    Column("cols", "n, input features"),
    Column("chain", "family of the chain"),
    Column("rank", "rank of the chain"),
    Column("parameters", "values of the chain"),
    Column("share", "`parameters` / (m·n)", "ratio"),
    Column("relative_loss", "share of the output energy that the best known chain of this rank loses", SHARE),
    Column("relative_loss_lower", "share that every chain of this rank loses at least", SHARE),
    Column("interpolated", "whether `relative_loss` was interpolated between ranks"),
)  # fmt: skip
PLAN = (
    Column("layer", "name of the weight in the checkpoint", header="layer"),
    Column("rows", "m, output features", header="rows"),
    Column("cols", "n, input features", header="columns"),
    Column("chain", "family of the chain, or `dense` if the weight stays as it is", header="chain"),
    Column("rank", "rank of the chain; empty for dense", header="rank", form="{:.0f}"),
    Column("parameters", "values of the chain, or m·n for dense; biases are not counted", header="parameters"),
    Column("dense_parameters", "m·n"),
    Column("share", "`parameters` / `dense_parameters`", "ratio", "share", "{:.1%}"),
    Column("relative_loss", "share of the output energy that the best known chain loses", SHARE, "energy lost",
           "{:.2%}"),
    Column("relative_loss_lower", "share that every chain of this rank loses at least", SHARE, "at least", "{:.2%}"),
    Column("interpolated", "whether `relative_loss` was interpolated between ranks"),
    Column("shared_with", "names of weights that are tied to this one, separated by spaces; they count once"),
)  # fmt: skip
