"""The inputs of one weight from a file: moments that were collected, or raw samples; checked before they are used."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ks.errors import UsageError, one_line
from ks.files.globs import nearest
from ks.files.memory import check_fits
from ks.files.weights import entries_of, read_entry, tensors_sha256
from ks.moments.metric import LossMetric, Metric
from ks.moments.moments_file import InputMoments, moments_metadata
from ks.moments.second_moment import FLOAT32_ROUNDING, VectorSums, is_semi_definite

ENOUGH_PER_FEATURE = 10  # inputs; in a trial with 13 per feature, a floor was still 30% too low


@dataclass(frozen=True)
class Calibration:
    """The inputs that were measured for one weight, or their moments.

    Args:
        train: sums to work with; their second moment is symmetric, and positive semi-definite up to rounding.
        held_out: sums to check with; None if there are none.
        key: of the inputs in their file; None for a lone array.
        sha256: hash of the values, equal for the same values in another file.
        samples: the rows of a file of raw samples, shape (N, n), dtype as stored: first the `train.count` training
            rows, then those held out. None for a moments file.
        transposed: whether the weight is stored as (in, out); None if the file has no such record.
        notes: remarks for the user, a line each.
        gradients, held_out_gradients: sums of the gradients at the outputs; None if there are none.
        gradients_sha256: hash of these values; None if there are none.
        unit: of the loss of the gradients.
    """

    train: VectorSums
    held_out: VectorSums | None
    key: str | None
    sha256: str
    samples: torch.Tensor | None = None
    transposed: bool | None = None
    notes: tuple[str, ...] = ()
    gradients: VectorSums | None = None
    held_out_gradients: VectorSums | None = None
    gradients_sha256: str | None = None
    unit: str = ""

    def metric(self, kind: LossMetric, held_out: bool = False) -> Metric:
        """Return the metric of the training part, or of the held-out part; that of the loss needs gradients."""
        inputs, gradients = self.train, self.gradients
        if held_out:
            assert self.held_out is not None
            inputs, gradients = self.held_out, self.held_out_gradients or self.gradients
        if kind is LossMetric.OUTPUT_ENERGY:
            return Metric(inputs.second_moment)
        assert gradients is not None  # `ks.model.candidates.check_inputs` and the flags of a study refuse such inputs
        return Metric(inputs.second_moment, gradients.second_moment)


def read_input_moments(
    path, width: int, key: str | None = None, val_split: float = 0.2, *, weight_key: str | None = None
) -> Calibration:
    """Read the inputs of a weight of shape (m, n).

    Args:
        path: .safetensors file of `InputMoments.save`; or raw samples (N, n) as .npy, .pt, .pth or .safetensors.
        width: n, the number of input features.
        key: of the weight in the moments file, or of the samples in their file.
        val_split: fraction of raw samples that is held out, the last rows; a moments file has its own held-out part.
        weight_key: key of the weight in its checkpoint, used if `key` is None.
    Raises:
        UsageError: the file or the key is missing or damaged; the inputs have another width, are not finite, or are
            no moments of real inputs; or they exceed the memory.
    """
    path = Path(path)
    try:
        entries = entries_of(path, "inputs")
        if moments_metadata(path) is not None:
            return inputs_of(InputMoments.open(path), width, key or weight_key)
        return _read_samples(path, entries, width, key, val_split, weight_key)
    except OSError as error:  # a folder above it is closed, or the name is too long
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def packed_inputs(path, key: str | None) -> bytes:
    """Return a file with the same suffix that has the inputs of one weight alone, as bytes, for another machine.

    Args:
        path: as in `read_input_moments`, which reads the result with the same keys.
        key: of the weight in the moments file.
    """
    path = Path(path)
    return path.read_bytes() if moments_metadata(path) is None else InputMoments.open(path).only(key).packed()


def inputs_of(moments: InputMoments, width: int, weight_key: str | None) -> Calibration:
    """Return the inputs of a weight, checked for properties that all sums over real inputs have.

    Args:
        moments: of the model.
        width: n, the number of input features.
        weight_key: key of the weight in its checkpoint; None if the moments are of one weight alone.
    Raises:
        UsageError: the key is missing; the inputs have another width, or are no moments of real inputs.
    """
    moments = moments.only(weight_key)
    [(found, name)] = moments.aliases.items()
    transposed = found in moments.transposed
    where = f"{moments.source}, inputs {one_line(name)!r}"
    train, held_out = moments.train[name], moments.held_out.get(name)
    if train.width != width:
        advice = "its model stores this weight as (in, out), so transpose it" if transposed else "choose their key"
        raise UsageError(f"{where} are {train.width} wide, and the weight takes {width} inputs; {advice}")
    if train.count == 0:
        raise UsageError(f"{where}: count is 0, so no input was seen; collect the moments from more batches")
    if held_out is not None and held_out.width != width:
        raise UsageError(f"{where}: the held-out part is {held_out.width} wide, not {width}; collect the moments again")
    of = f"{moments.source}, gradients of {one_line(found)!r}"
    same = weight_key is None or found in (weight_key, f"{weight_key}.weight")
    renamed = [] if same else [f"inputs of {one_line(str(weight_key))}: found in {moments.source} as {one_line(found)}"]
    sha256, gradients_sha256 = hashes_of(moments)
    return Calibration(
        _checked(train, where),
        _checked_if_any(held_out, f"{where}, held out"),
        found,
        sha256,
        transposed=transposed,
        notes=(*renamed, *_few(where, train)),
        gradients=_checked_if_any(moments.gradients.get(found), of, "gradients"),
        held_out_gradients=_checked_if_any(moments.held_out_gradients.get(found), f"{of}, held out", "gradients"),
        gradients_sha256=gradients_sha256,
        unit=moments.unit,
    )


def hashes_of(moments: InputMoments) -> tuple[str, str | None]:
    """Return the hashes of the inputs and of the gradients in moments of one weight, without the checks of `inputs_of`.

    They are `Calibration.sha256` and `Calibration.gradients_sha256`.
    """

    def sha256(*parts: Mapping[str, VectorSums]) -> str:
        given = [sums for part in parts for sums in part.values() if sums.count]
        return tensors_sha256(*(each for sums in given for each in (sums.sum_xx, sums.sum_x, torch.tensor(sums.count))))

    has_gradients = any(sums.count for sums in moments.gradients.values())
    of_gradients = sha256(moments.gradients, moments.held_out_gradients) if has_gradients else None
    return sha256(moments.train, moments.held_out), of_gradients


def _read_samples(
    path: Path, entries: dict, width: int, key: str | None, val_split: float, weight_key: str | None
) -> Calibration:
    name, notes = _samples_key(path, entries, key, weight_key)
    where = f"{path}, key {one_line(name)!r}" if name else f"{path}"
    samples = read_entry(entries[name], where)
    if not samples.is_floating_point() or samples.element_size() < 2:
        raise UsageError(f"{where} has dtype {str(samples.dtype).removeprefix('torch.')}; floating samples are needed")
    if samples.ndim != 2 or not samples.numel():
        raise UsageError(
            f"{where} has shape {tuple(samples.shape)}; samples (N, {width}) are needed (x.reshape(-1, {width}))"
        )
    if samples.shape[1] != width:
        raise UsageError(f"{where} has samples of width {samples.shape[1]}, and the weight takes {width} inputs")
    if not samples.isfinite().all():
        raise UsageError(f"{where} holds NaN or infinite values; finite samples are needed")
    num_train = len(samples) - round(len(samples) * val_split)
    if num_train < 1:
        raise UsageError(
            f"{where}: of {len(samples)} samples, holding out a fraction of {val_split} leaves none; give more"
        )
    check_fits(f"the second moment of {where}", 6 * width * width * 8, "use a machine with more memory")
    train, held_out = VectorSums.of(samples[:num_train]), VectorSums.of(samples[num_train:])
    return Calibration(
        _checked(train, where),
        _checked_if_any(held_out, f"{where}, held out"),
        name or None,
        tensors_sha256(samples),
        samples.contiguous(),
        notes=(*notes, *_few(where, train)),
    )


def _samples_key(path: Path, entries: dict, key: str | None, weight_key: str | None) -> tuple[str, list[str]]:
    """Return the name of the samples in their file, and remarks."""
    if list(entries) == [""]:
        return "", []
    for wanted in (key, weight_key):
        if wanted is not None and wanted in entries:
            return wanted, []
    if key is not None:
        raise UsageError(f"{path} has no key {one_line(key)!r}; {nearest(key, entries)}")
    if len(entries) != 1:
        raise UsageError(f"{path} holds {len(entries)} tensors; give the key of the samples, {nearest('', entries)}")
    [name] = entries
    return name, [f"samples of {path}: its only tensor, {one_line(name)}"] if weight_key else []


def _checked_if_any(sums: VectorSums | None, where: str, what: str = "inputs") -> VectorSums | None:
    """Return checked sums, or None for those over no vectors."""
    return None if sums is None or not sums.count else _checked(sums, where, what)


def _checked(sums: VectorSums, where: str, what: str = "inputs") -> VectorSums:
    """Return sums with an exactly symmetric Σ x xᵀ, checked for properties that all sums over real vectors have.

    C − μμᵀ, a covariance, is positive semi-definite, so that C is so too and Σ x belongs to it.
    """
    second_moment, mean = sums.second_moment, sums.mean
    size = second_moment.norm().item()
    if not size < float("inf"):
        raise UsageError(f"{where}: the second moment overflows; scale the {what} down")
    if size == 0:
        effect = "so that every output is" if what == "inputs" else "so that the loss does not depend on the outputs"
        raise UsageError(f"{where}: all {what} are zero, {effect}; choose another layer")
    asymmetry = (second_moment - second_moment.t()).abs().max().item()
    if asymmetry > FLOAT32_ROUNDING * size:
        raise UsageError(f"{where}: sum_xx is not symmetric (by {asymmetry / size:.1e} of its norm); collect it again")
    symmetric = VectorSums((sums.sum_xx + sums.sum_xx.t()) / 2, sums.sum_x, sums.count)
    second_moment = symmetric.second_moment
    if not is_semi_definite(second_moment - mean.outer(mean), FLOAT32_ROUNDING * size):
        if is_semi_definite(second_moment, FLOAT32_ROUNDING * size):
            raise UsageError(f"{where}: sum_x does not belong to sum_xx (the covariance is not positive semi-definite)")
        smallest = torch.linalg.eigvalsh(second_moment)[0].item()
        raise UsageError(
            f"{where}: sum_xx is not positive semi-definite (smallest eigenvalue {smallest / size:.1e} of its norm); "
            "collect it again"
        )
    return symmetric


def _few(where: str, train: VectorSums) -> list[str]:
    """Return a remark if there are too few training inputs for their width."""
    count, width = train.count, train.width
    if count >= ENOUGH_PER_FEATURE * width:
        return []
    singular = "the second moment is singular, so " if count < width else ""
    return [
        f"{where}: only {count:,} samples for {width:,} features: {singular}floors are optimistic and held-out losses "
        f"higher. Collect at least {ENOUGH_PER_FEATURE * width:,}."
    ]
