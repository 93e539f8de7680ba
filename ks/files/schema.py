"""Records of the files of a study that are no tables: types, lengths and ranges, checked whenever one is read back.

A resumed study ignores an invalid file, says why and trains the rank again; a plot and `ks.load` refuse it in a line.
"""

import warnings
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from msgspec import UNSET, Meta, Struct, field

from ks.errors import UsageError, one_line
from ks.files import columns
from ks.files.columns import Count, Duration, Loss, Number, Positive, Seed, Text
from ks.files.rows import checked_rows, readable
from ks.files.torch_files import plain

PositiveLoss = Annotated[float, Meta(gt=0.0, le=1e300)]
Record = TypeVar("Record", bound=Struct)

_Latencies: Any = msgspec.defstruct("_", [(column.name, column.type | None, None) for column in columns.LATENCIES])


class Latency(_Latencies, kw_only=True):  # type: ignore[call-arg]
    """Median milliseconds of a forward pass of chain, dense and low-rank, with CPU threads, dtype and device of all.

    `launched` is "eager" or "CUDA graph"; then `eager` has the times of eager calls beside.
    """

    threads: Positive
    dtype: Text
    device: Text
    launched: Text = "eager"
    eager: dict[str, Duration] = field(default_factory=dict)


class TrainingLog(Struct):
    """PREFIX_training_log.json."""

    status: Text
    train_seconds: Duration | None = None
    epochs: Positive | None = None
    relative_loss: Loss | None = None
    loss_increase: Loss | None = None
    held_out_loss_increase: Loss | None = None
    energy_loss: Loss | None = None
    resumed_after: Count | None = None
    started: Text = ""
    ended: Text = ""
    latency: Latency | None = None


class Choice(Struct):
    """A decision of the program in a run's config."""

    name: Text
    reason: Text = ""


class RunConfig(Struct):
    """PREFIX_config.json of a run."""

    settings: dict[str, Any]
    files: list[Text] = field(default_factory=list)
    loss: Choice | None = None  # of earlier versions
    provenance: dict[str, Any] = field(default_factory=dict)


class WeightRecord(Struct):
    sha256: Text | None = None
    shape: tuple[Positive, Positive] | None = None
    key: Text | None = None
    dtype: Text | None = None


class InputsRecord(Struct):
    kind: Text | None = None
    std: Number | None = None
    key: Text | None = None
    sha256: Text | None = None
    count: Count | None = None
    held_out_count: Count | None = None
    effective_rank: Number | None = None
    centred: bool = False
    gradients_sha256: Text | None = None
    damping: Number | None = None


class ProblemRecord(Struct):
    chain: Text | None = None
    weight: WeightRecord = field(default_factory=WeightRecord)
    inputs: InputsRecord = field(default_factory=InputsRecord)
    predict_zero_loss: PositiveLoss | None = None
    held_out_predict_zero_loss: PositiveLoss | None = None


class StudyRecord(Struct):
    """PREFIX_config.json of a study."""

    settings: dict[str, Any]
    ranks: list[Positive]
    seeds: Annotated[list[Seed], Meta(min_length=1)]
    layers: list[Text] = field(default_factory=list)  # of a checkpoint; each has a study of its own
    arguments: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    title: Text | None = None
    loss: Text | None = None  # of earlier versions, whose settings do not name the criterion
    answer: list[Text] = field(default_factory=list)
    advice: list[Text] = field(default_factory=list)
    problem: ProblemRecord = field(default_factory=ProblemRecord)
    files: list[Text] = field(default_factory=list)


class CurveLists(Struct):
    """PREFIX_rank_R_loss_curves.json, as far as it is read."""

    rank: Positive
    epochs: list[Positive]
    train_losses: list[float | None]
    val_losses: list[float | None]
    population_losses: list[float | None]


class BestRecord(Struct):
    val_loss: Loss
    epoch: Positive
    factors: list[torch.Tensor]


class CheckpointRecord(Struct):
    """PREFIX_resume.pth."""

    settings: dict[str, str | int | float | bool | None]
    threads: Annotated[int, Meta(ge=1, le=4096)]
    curves: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    optimizer: list[torch.Tensor]
    schedule: tuple[float, int, float]
    best: BestRecord

    def __post_init__(self):
        metrics = columns.metric_names(self.curves)
        columns.check_metric_names(metrics)
        declared = (*columns.CURVES, *columns.metric_columns(metrics, float | None))
        needed = ("epoch", "train_loss", "val_loss", "rank", "lr", "epoch_seconds")
        self.curves = checked_rows(self.curves, declared, needed, absent=UNSET)


class SavedChain(Struct):
    """A saved chain, as `ks.load` reads it."""

    format: Text
    version: Count
    patterns: Annotated[list[tuple[Positive, Positive, Positive, Positive]], Meta(min_length=1, max_length=1000)]
    batch_last: bool
    state_dict: dict[str, torch.Tensor]


class CheckpointIndex(Struct):
    """The index of a checkpoint in several files: the file of every tensor."""

    weight_map: dict[Text, Text]


class CompressedLayer(Struct):
    """A chain of a compressed model."""

    patterns: Annotated[list[tuple[Positive, Positive, Positive, Positive]], Meta(min_length=1, max_length=1000)]
    batch_last: bool = False
    bias: bool = False
    stored_transposed: bool = False


class CompressedModel(Struct):
    """compressed.json beside the tensors of a compressed model.

    `model` is the name of its class, `buffers` are those that the state_dict lacks, `files` all files of the folder but
    this one.
    """

    format: Text
    version: Positive
    model: Text
    layers: dict[Text, CompressedLayer]
    aliases: dict[Text, Text] = field(default_factory=dict)
    densified: bool = False
    buffers: list[Text] = field(default_factory=list)
    files: list[Text] = field(default_factory=list)


def convert(content: Any, kind: type[Record], where: str) -> Record:
    """Check the content of a file against its schema.

    Args:
        content: of the file.
        kind: a schema of this module.
        where: the file, for the message.
    Raises:
        UsageError: it does not fit; the message names the first entry that does not.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # msgspec looks up names in a tensor, of which torch warns
            return msgspec.convert(content, kind, dec_hook=_only_tensors)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UsageError(f"{where} is not valid: {one_line(error)}") from error


def read_json_as(path, kind: Any, what: str = "results") -> Any:
    """Read a JSON file and check it against a schema.

    Args:
        path: of the file.
        kind: a schema of this module, or a list of one.
        what: the file should hold, for the message.
    Raises:
        UsageError: no regular file, too large, no JSON, or not valid.
    """
    with readable(Path(path), what) as path:
        return msgspec.json.decode(path.read_bytes(), type=kind)


def _only_tensors(kind: type, value: Any) -> Any:
    """Take a tensor as it is; msgspec adds the place in the file to the message."""
    if kind is torch.Tensor and isinstance(value, torch.Tensor):
        return plain(value, "the tensor")
    raise msgspec.ValidationError(f"expected a tensor, found {type(value).__name__}")
