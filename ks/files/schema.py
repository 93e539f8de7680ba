"""What the files of a study must hold: types, lengths and ranges, checked whenever one is read back.

A resumed study ignores an invalid file, says why and trains the rank again; a plot and `ks.load` refuse it in a line.
"""

import csv
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from msgspec import UNSET, Meta, Struct, field

from ks.errors import UsageError, one_line
from ks.files import columns
from ks.files.columns import Column, Count, Duration, Loss, Number, Positive, Seed, Text
from ks.files.torch_files import plain

MAX_BYTES = 2**28  # of a JSON or CSV file

PositiveLoss = Annotated[float, Meta(gt=0.0, le=1e300)]
Record = TypeVar("Record", bound=Struct)

_Latencies: Any = msgspec.defstruct("_", [(column.name, column.type | None, None) for column in columns.LATENCIES])


class Latency(_Latencies, kw_only=True):  # type: ignore[call-arg]
    """Median milliseconds of a forward pass of chain, dense and low-rank, with CPU threads, dtype and device of all."""

    threads: Positive
    dtype: Text
    device: Text


class TrainingLog(Struct):
    """PREFIX_training_log.json."""

    status: Text
    train_seconds: Duration | None = None
    epochs: Positive | None = None
    relative_loss: Loss | None = None
    resumed_after: Count | None = None
    latency: Latency | None = None


class Choice(Struct):
    """A decision of the program in a run's config."""

    name: Text
    reason: Text = ""


class RunConfig(Struct):
    """PREFIX_config.json of a training."""

    settings: dict[str, Any]
    files: list[Text] = field(default_factory=list)
    loss: Choice | None = None  # of earlier versions


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


class StudyRecord(Struct):
    """PREFIX_config.json of a study."""

    settings: dict[str, Any]
    ranks: list[Positive]
    seeds: Annotated[list[Seed], Meta(min_length=1)]
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


class InputMomentsRecord(Struct):
    """Metadata of a file of input moments; `ks.moments.moments_file.InputMoments` describes the fields."""

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
    """compressed.json beside the tensors of a compressed model; `ks.model.saved_model` describes the fields."""

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


def row_type(declared: Iterable[Column], needed: Collection[str], absent: Any = None) -> type[Struct]:
    """Return the schema of a row.

    Args:
        declared: its columns; other keys are left out.
        needed: names of the columns that must have a value.
        absent: of the other columns: None if they may be null or missing and then have their default, UNSET if they may
            be missing but not null.
    """
    fields, names = [], {}
    for index, column in enumerate(declared):
        names[f"field_{index}"] = column.name  # the name of a metric need not be one of Python's
        default = column.default if absent is None else absent
        optional = (column.type | type(absent), default)
        fields.append((f"field_{index}", *((column.type,) if column.name in needed else optional)))
    return msgspec.defstruct("Row", fields, rename=names, kw_only=True)


def checked_rows(rows: list[dict], declared: Iterable[Column], needed: Collection[str], absent: Any = None) -> list:
    """Return rows as `row_type` takes them; raise msgspec.ValidationError for one that it does not."""
    return msgspec.to_builtins(msgspec.convert(rows, list[row_type(declared, needed, absent)]))  # type: ignore[misc]


def read_summary(path) -> list[dict]:
    """Read PREFIX_summary.json, ours (with a status) or one of the 2025 ksmm scripts.

    Returns:
        the rows with all columns, None where a value is missing, and the columns of metrics.
    Raises:
        UsageError: no regular file, too large, no JSON, or not valid.
    """
    with _checked(Path(path), "a summary") as path:
        rows = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
        metrics = columns.metric_columns(columns.summary_metrics(rows))
        return checked_rows(rows, (*columns.SUMMARY, *metrics), ("rank",))


def read_table(
    path,
    declared: Iterable[Column],
    needed: Collection[str],
    filled: Collection[str] | None = None,
    metrics: bool = False,
    what: str = "results",
) -> list[dict]:
    """Read a CSV file with a header and check every row; an empty or non-finite cell has the default of its column.

    Args:
        path: of the file.
        declared: the columns that are read; others are left out.
        needed: names of the columns that the file must have.
        filled: names of the columns that must not be empty; `needed` if None.
        metrics: read every other column whose name a metric can have, too.
        what: the file should hold, for the message.
    Returns:
        one dict per row, with the columns of the file.
    Raises:
        UsageError: no regular file, too large, no CSV, columns missing, or not valid; the message has the line.
    """
    with _checked(Path(path), what) as path, open(path, newline="") as file:
        reader = csv.DictReader(file)
        header = dict.fromkeys(reader.fieldnames or [])
        if missing := [name for name in needed if name not in header]:
            raise UsageError(f"{path} lacks the columns {', '.join(missing)}")
        declared = [column for column in declared if column.name in header]
        if metrics:
            declared += columns.metric_columns(name for name in header if name not in columns.TAKEN)
        kind = row_type(declared, needed if filled is None else filled)
        rows = []
        try:
            for cells in reader:
                if None in cells:
                    raise csv.Error(f"more cells than the {len(header)} of the header")
                known = {name: cell for name, cell in cells.items() if not _is_empty(cell)}
                rows.append(msgspec.to_builtins(msgspec.convert(known, kind, strict=False)))
        except (msgspec.ValidationError, csv.Error) as error:
            raise UsageError(f"{path}, line {reader.line_num}: {one_line(error, 200)}") from error
        return rows


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
