"""The inputs that a chain learns from, as the flags give them: isotropic, or measured on a real layer."""

from dataclasses import dataclass
from typing import Any

import torch

from ks.chain.patterns import Chain
from ks.cli.flags import TrainingFlags
from ks.errors import UsageError, one_line
from ks.files.columns import ISOTROPIC
from ks.files.weights import Weight
from ks.moments.read import Calibration, read_input_moments
from ks.moments.second_moment import InputSums, SecondMoment
from ks.training.whitening import Coordinates, isotropic_coordinates, measured_coordinates

MEASURED = "measured"
SMALLEST_VARIANCE = 1e-12  # of the mean square of the inputs; float64 sums keep about three digits of it


@dataclass(frozen=True)
class LayerInputs:
    """The inputs x of a layer, and the coordinates in which a chain learns from them.

    Args:
        coordinates: y' and x'.
        moment: second moment of x', around the centre.
        predict_zero_loss: tr(W C Wᵀ) / m, in the user's units.
        held_out: second moment of held-out x around the same centre, in the user's coordinates; None if there is none.
        held_out_predict_zero_loss: loss of the zero predictor on held-out inputs.
        calibration: the measured inputs; None for isotropic ones.
        description: for config files; it identifies the inputs.
        notes: remarks for the user, a line each.
    """

    coordinates: Coordinates
    moment: SecondMoment
    predict_zero_loss: float
    held_out: SecondMoment | None
    held_out_predict_zero_loss: float | None
    calibration: Calibration | None
    description: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def given_count(self) -> int | None:
        """Return the number of raw training samples; None if there are none."""
        given = self.calibration
        return given.train.count if given is not None and given.samples is not None else None

    def held_out_samples(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return n samples x' whose second moment is that of the held-out inputs, and their targets y', float64.

        Args:
            weight: W, shape (m, n), in the user's units.
        """
        if self.held_out is None:
            return None
        count = weight.shape[1]
        unit = torch.eye(count, dtype=torch.float64).mul_(count**0.5)
        return self._inside(self.held_out.transform(unit), weight)

    def given_samples(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the raw training samples of the file as x', and their targets y', float64; None if it has moments.

        Args:
            weight: W, shape (m, n), in the user's units.
        """
        given = self.calibration
        if given is None or given.samples is None:
            return None
        samples = given.samples[: given.train.count].double()
        return self._inside(samples if self.coordinates.centre is None else samples - self.coordinates.centre, weight)

    def _inside(self, samples: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = samples @ weight.double().cpu().t() / self.predict_zero_loss**0.5
        return self.coordinates.samples(samples), targets


def layer_inputs(config: TrainingFlags, weight: Weight, chain: Chain) -> LayerInputs:
    """Return the inputs that the flags name.

    Raises:
        UsageError: flags that do not go together, or a file that does not fit the weight.
    """
    if config.inputs is None:
        if config.inputs_key is not None or config.fit_bias:
            name = "--inputs_key" if config.inputs_key is not None else "--fit_bias"
            raise UsageError(f"{name} without --inputs: give the file with the measured inputs too")
        return _isotropic(config.input_std, weight.tensor)
    if config.input_std != 1.0:
        raise UsageError(f"--input_std {config.input_std:g} together with --inputs: give one or the other")
    given = read_input_moments(
        config.inputs, weight.tensor.shape[1], config.inputs_key, config.val_split, weight_key=weight.key
    )
    if config.sampling == "fixed" and given.samples is None:
        raise UsageError(f"--sampling fixed needs raw samples, and {config.inputs} holds moments; use --sampling auto")
    return _measured(given, weight.tensor, chain, config)


def _isotropic(std: float, weight: torch.Tensor) -> LayerInputs:
    predict_zero_loss = SecondMoment.isotropic(std).output_energy(weight) / len(weight)
    note = (
        "Using isotropic random inputs. Floors and losses will differ on the layer's real inputs; pass those with "
        "--inputs."
    )
    coordinates, inside = isotropic_coordinates(weight)
    description = {"kind": ISOTROPIC, "std": std}
    return LayerInputs(coordinates, inside, predict_zero_loss, None, None, None, description, (note,))


def _measured(given: Calibration, weight: torch.Tensor, chain: Chain, config: TrainingFlags) -> LayerInputs:
    moment = SecondMoment(given.train.second_moment)
    centre = given.train.mean if config.fit_bias else None
    energy = moment.output_energy(weight)
    around = moment if centre is None else _centred(given, config.inputs)
    coordinates, inside = measured_coordinates(chain, energy / len(weight), around.matrix, centre)
    held_out, held_out_loss = None, None
    if given.held_out is not None:
        uncentred = SecondMoment(given.held_out.second_moment)
        held_out = uncentred if centre is None else SecondMoment(_around(given.held_out, centre))
        held_out_loss = uncentred.output_energy(weight) / len(weight)
    counts = {"count": given.train.count, "held_out_count": given.held_out.count if given.held_out else 0}
    description = {
        "kind": MEASURED,
        "key": given.key,
        "sha256": given.sha256,
        **counts,
        "effective_rank": moment.effective_rank,
        "centred": config.fit_bias,
    }
    name = f" {one_line(given.key)}" if given.key else ""
    note = (
        f"Using the measured inputs of {one_line(config.inputs)}{name}: {counts['count']} inputs and "
        f"{counts['held_out_count']} held out, effective rank {moment.effective_rank:.1f} of {weight.shape[1]}."
    )
    notes = [note, *given.notes]
    if given.transposed and not config.transpose:
        notes.append("The model of these inputs stores the weight as (in, out): give --transpose if the file does too.")
    return LayerInputs(
        coordinates, inside, energy / len(weight), held_out, held_out_loss, given, description, tuple(notes)
    )


def _centred(given: Calibration, path: str | None) -> SecondMoment:
    """Return the second moment of the training inputs around their mean.

    Raises:
        UsageError: it is lost in the rounding of the mean.
    """
    around = _around(given.train, given.train.mean)
    trouble = f"--fit_bias: the inputs of {path} vary too little around their mean for the digits of their moments"
    if around.trace() <= SMALLEST_VARIANCE * given.train.second_moment.trace():
        raise UsageError(f"{trouble}; leave it out")
    try:
        return SecondMoment(around)
    except UsageError as error:
        raise UsageError(f"{trouble} ({error}); leave it out") from error


def _around(part: InputSums, centre: torch.Tensor) -> torch.Tensor:
    """Return the second moment of x − μ: C − m μᵀ − μ mᵀ + μ μᵀ with m the mean of x; C − μ μᵀ if m is μ."""
    cross = part.mean.outer(centre)
    moment = part.second_moment - cross - cross.t() + centre.outer(centre)
    return (moment + moment.t()) / 2
