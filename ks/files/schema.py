"""What the files of a study must hold: types, lengths and ranges, checked whenever one is read back.

A resumed study ignores an invalid file, says why and trains the rank again; a plot and `ks.load` refuse it in a line.
"""

import csv
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
import torch
from msgspec import Meta, Struct, field

from ks.errors import UsageError, one_line
from ks.files.torch_files import plain

MAX_BYTES = 2**28  # of a JSON or CSV file

Count = Annotated[int, Meta(ge=0, le=2**53)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Loss = Annotated[float, Meta(ge=0.0, le=1e300)]
PositiveLoss = Annotated[float, Meta(gt=0.0, le=1e300)]
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Text = Annotated[str, Meta(max_length=10_000)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e12)]
Milliseconds = Annotated[float, Meta(ge=0.0, le=1e12)]
Record = TypeVar("Record", bound=Struct)


class Latency(Struct):
    """Median milliseconds of a forward pass of chain, dense and low-rank, with CPU threads, dtype and device of all."""

    threads: Positive
    dtype: Text
    device: Text
    latency_ms_batch_1: Milliseconds | None = None
    latency_ms_batch_32: Milliseconds | None = None
    latency_ms_batch_1024: Milliseconds | None = None
    dense_latency_ms_batch_1: Milliseconds | None = None
    dense_latency_ms_batch_32: Milliseconds | None = None
    dense_latency_ms_batch_1024: Milliseconds | None = None
    lowrank_latency_ms_batch_1: Milliseconds | None = None
    lowrank_latency_ms_batch_32: Milliseconds | None = None
    lowrank_latency_ms_batch_1024: Milliseconds | None = None


class TrainingLog(Struct):
    """PREFIX_training_log.json."""

    status: Text
    train_seconds: Seconds | None = None
    epochs: Positive | None = None
    relative_loss: Loss | None = None
    resumed_after: Count | None = None
    copy_of: Positive | None = None
    latency: Latency | None = None


class Choice(Struct):
    """A decision of the program in a run's config."""

    name: Text
    reason: Text = ""


class RunConfig(Struct):
    """PREFIX_config.json of a training."""

    settings: dict[str, Any]
    files: list[Text] = field(default_factory=list)
    loss: Choice | None = None


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


class ProblemRecord(Struct):
    chain: Text | None = None
    weight: WeightRecord = field(default_factory=WeightRecord)
    inputs: InputsRecord = field(default_factory=InputsRecord)
    predict_zero_loss: PositiveLoss | None = None
    held_out_predict_zero_loss: PositiveLoss | None = None


class SweepConfig(Struct):
    """PREFIX_config.json of a sweep."""

    settings: dict[str, Any]
    ranks: list[Positive]
    seeds: Annotated[list[Seed], Meta(min_length=1)]
    arguments: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    title: Text | None = None
    loss: Text | None = None
    answer: list[Text] = field(default_factory=list)
    advice: list[Text] = field(default_factory=list)
    problem: ProblemRecord = field(default_factory=ProblemRecord)
    files: list[Text] = field(default_factory=list)


class StudyRecord(Struct):
    """PREFIX_config.json of a sweep, as far as a rerun needs it."""

    settings: dict[str, Any]
    ranks: list[Positive]
    seeds: Annotated[list[Seed], Meta(min_length=1)]
    arguments: dict[str, Any] = field(default_factory=dict)


class CurveLists(Struct):
    """PREFIX_rank_R_loss_curves.json, as far as it is read."""

    rank: Positive
    epochs: list[Positive]
    train_losses: list[float | None]
    val_losses: list[float | None]
    population_losses: list[float | None]


class SummaryRow(Struct):
    """A row of PREFIX_summary.json, ours (with a status) or one of the 2025 ksmm scripts."""

    rank: Positive
    status: Text | None = None
    final_train_loss: Loss | None = None
    final_val_loss: Loss | None = None
    min_train_loss: Loss | None = None
    min_val_loss: Loss | None = None
    min_train_epoch: Count | None = None
    min_val_epoch: Count | None = None
    num_epochs: Count | None = None
    population_loss: Loss | None = None
    loss_floor: Loss | None = None
    loss_floor_upper: Loss | None = None
    loss_floor_is_exact: bool | None = None
    optimality_gap: Number | None = None
    excess: Number | None = None
    relative_loss: Loss | None = None
    parameters: Positive | None = None
    compression_ratio: Loss | None = None
    saturated: bool | None = None
    verdict: Text | None = None
    num_seeds: Count | None = None
    final_train_loss_se: Loss | None = None
    final_val_loss_se: Loss | None = None
    population_loss_se: Loss | None = None
    train_seconds: Seconds | None = None
    removed_share: Number | None = None
    held_out_relative_loss: Loss | None = None
    isotropic_floor: Loss | None = None
    segments: Text | None = None
    relative_floor: Loss | None = None
    relative_floor_upper: Loss | None = None
    relative_loss_se: Loss | None = None
    share_of_dense: Loss | None = None
    predict_zero_loss: Loss | None = None
    target_relative_loss: Loss | None = None
    reached_target: bool | None = None
    weight: Text | None = None
    weight_key: Text | None = None
    weight_sha256: Text | None = None
    chain: Text | None = None
    inputs: Text | None = None
    latency_ms_batch_1: Milliseconds | None = None
    latency_ms_batch_32: Milliseconds | None = None
    latency_ms_batch_1024: Milliseconds | None = None
    dense_latency_ms_batch_1: Milliseconds | None = None
    dense_latency_ms_batch_32: Milliseconds | None = None
    dense_latency_ms_batch_1024: Milliseconds | None = None
    lowrank_latency_ms_batch_1: Milliseconds | None = None
    lowrank_latency_ms_batch_32: Milliseconds | None = None
    lowrank_latency_ms_batch_1024: Milliseconds | None = None


class CurveRow(Struct):
    """A row of PREFIX_rank_R_loss_curves.csv, ours or of the 2025 ksmm scripts."""

    epoch: Positive
    train_loss: Loss | None
    val_loss: Loss | None
    rank: Positive
    population_loss: Loss = math.nan
    lr: float = math.nan
    epoch_seconds: Seconds = math.nan
    segment: Positive = 1
    grad_norm: float = math.nan


class FloorRow(Struct):
    """A row of PREFIX_floor.csv."""

    chain: Text
    rank: Positive
    parameters: Positive
    loss_floor: Loss
    relative_loss: Loss


class RunRow(Struct):
    """A row of PREFIX_runs.csv, as far as it is read."""

    rank: Positive
    seed: Seed
    status: Text


class EpochRow(TypedDict):
    """A row of the curves in a checkpoint."""

    epoch: Positive
    train_loss: Loss
    val_loss: Loss
    rank: Positive
    lr: float
    epoch_seconds: Seconds
    population_loss: NotRequired[Loss]
    segment: NotRequired[Positive]
    grad_norm: NotRequired[float]


class BestRecord(Struct):
    val_loss: Loss
    epoch: Positive
    factors: list[torch.Tensor]


class CheckpointRecord(Struct):
    """PREFIX_resume.pth."""

    settings: dict[str, str | int | float | bool | None]
    threads: Annotated[int, Meta(ge=1, le=4096)]
    curves: Annotated[list[EpochRow], Meta(min_length=1)]
    optimiser: list[torch.Tensor]
    schedule: tuple[float, int, float]
    best: BestRecord


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


class InputMomentsRecord(Struct):
    """Metadata of a file of input moments; `ks.inputs.moments_file.InputMoments` describes the fields."""

    version: Positive
    aliases: Annotated[dict[Text, Text], Meta(min_length=1)]
    batches: dict[Text, Count]
    created: Text
    transposed: list[Text] = field(default_factory=list)
    model: Text = ""
    libraries: dict[Text, Text] = field(default_factory=dict)


class CompressedLayer(Struct):
    """A chain of a compressed model."""

    patterns: Annotated[list[tuple[Positive, Positive, Positive, Positive]], Meta(min_length=1, max_length=1000)]
    batch_last: bool = False
    bias: bool = False
    stored_transposed: bool = False


class CompressedModel(Struct):
    """compressed.json beside the tensors of a compressed model; `ks.compression.saved_model` describes the fields."""

    format: Text
    version: Positive
    model: Text
    layers: dict[Text, CompressedLayer]
    aliases: dict[Text, Text] = field(default_factory=dict)
    densified: bool = False


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
    with _checked(Path(path), what) as path:
        return msgspec.json.decode(path.read_bytes(), type=kind)


def read_csv_as(path, kind: type[Record], what: str = "results") -> tuple[list[str], list[Record]]:
    """Read a CSV file with a header and check every row against a schema.

    An empty or non-finite cell has the default of its column; columns that the schema lacks are left out.

    Args:
        path: of the file.
        kind: a schema of this module with numbers and texts as fields.
        what: the file should hold, for the message.
    Returns:
        the names of the columns in the file, and the rows.
    Raises:
        UsageError: no regular file, too large, no CSV, columns missing, or not valid; the message has the line.
    """
    needed = [field.name for field in msgspec.structs.fields(kind) if field.required]
    with _checked(Path(path), what) as path, open(path, newline="") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        if missing := [name for name in needed if name not in header]:
            raise UsageError(f"{path} lacks the columns {', '.join(missing)}")
        rows = []
        try:
            for cells in reader:
                if None in cells:
                    raise csv.Error(f"more cells than the {len(header)} of the header")
                known = {name: cell for name, cell in cells.items() if not _is_empty(cell)}
                rows.append(msgspec.convert(dict.fromkeys(needed) | known, kind, strict=False))
        except (msgspec.ValidationError, csv.Error) as error:
            raise UsageError(f"{path}, line {reader.line_num}: {one_line(error, 200)}") from error
        return header, rows


def _is_empty(cell: str | None) -> bool:
    return not cell or cell.strip().lower().lstrip("+-") in ("", "nan", "inf", "infinity")


@contextmanager
def _checked(path: Path, what: str) -> Iterator[Path]:
    """Refuse what is no regular file of a sane size; turn the errors of a damaged one into one line."""
    try:
        if not path.exists():
            raise UsageError(f"{path} cannot be read: no such file")
        if not path.is_file():  # a FIFO would block
            raise UsageError(f"{path} cannot be read: it is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, so it does not hold {what}")
        yield path
    except (msgspec.MsgspecError, RecursionError, csv.Error) as error:
        raise UsageError(f"{path} is not valid: {one_line(error, 200)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read: it is no text") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error


def _only_tensors(kind: type, value: Any) -> Any:
    """Take a tensor as it is; msgspec adds the place in the file to the message."""
    if kind is torch.Tensor and isinstance(value, torch.Tensor):
        return plain(value, "the tensor")
    raise msgspec.ValidationError(f"expected a tensor, found {type(value).__name__}")
