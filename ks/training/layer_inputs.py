"""The inputs of a layer that the flags describe: the metrics of an error, the coordinates, the held-out part."""

from dataclasses import dataclass
from typing import Any

import torch

from ks.chain.patterns import Chain
from ks.cli.flags import TrainingFlags
from ks.errors import UsageError, one_line
from ks.files.columns import ISOTROPIC
from ks.files.weights import Weight
from ks.moments.metric import LossMetric, Metric
from ks.moments.read import Calibration, read_input_moments
from ks.moments.second_moment import SecondMoment, VectorSums
from ks.training.whitening import Coordinates, isotropic_coordinates, measured_coordinates

MEASURED = "measured"
SMALLEST_VARIANCE = 1e-12  # of the mean square of the inputs; float64 sums keep about three digits of it
ISOTROPIC_NOTE = (
    "Using isotropic random inputs. Floors and losses will differ on the layer's real inputs; pass those with --inputs."
)


@dataclass(frozen=True)
class LayerInputs:
    """The inputs x of a layer, and the coordinates in which a chain learns from them.

    Args:
        coordinates: y' and x'.
        metric: of an error in y' and x', around the centre.
        predict_zero_loss: tr(W C Wᵀ) / m, or ½ tr(G W C Wᵀ) for the loss of the model, in the user's units.
        output_energy: tr(W C Wᵀ).
        description: for config files; it identifies the inputs.
        notes: remarks for the user, a line each.
        loss_metric: the kind of the metric.
        held_out: the metric of held-out inputs around the same centre, in the user's coordinates; None without them.
        held_out_predict_zero_loss: loss of the zero predictor on held-out inputs.
        model_metric, held_out_model_metric: G ⊗ C around the centre in the user's coordinates, whichever metric trains;
            None without G.
        unit: of the loss of the model, as nats; empty without gradients.
        given: raw samples to train on, shape (N, n); None unless --sampling is fixed.
    """

    coordinates: Coordinates
    metric: Metric
    predict_zero_loss: float
    output_energy: float
    description: dict[str, Any]
    notes: tuple[str, ...]
    loss_metric: LossMetric = LossMetric.OUTPUT_ENERGY
    held_out: Metric | None = None
    held_out_predict_zero_loss: float | None = None
    model_metric: Metric | None = None
    held_out_model_metric: Metric | None = None
    unit: str = ""
    given: torch.Tensor | None = None


def layer_inputs(config: TrainingFlags, weight: Weight, chain: Chain) -> LayerInputs:
    """Return the inputs for the flags.

    Raises:
        UsageError: flags that do not go together, or a file that does not fit the weight.
    """
    if config.inputs is None:
        needing = {
            "inputs_key": config.inputs_key,
            "fit_bias": config.fit_bias,
            "loss_metric model_loss": config.loss_metric == LossMetric.MODEL_LOSS,
        }
        for name, is_given in needing.items():
            if is_given:
                raise UsageError(f"--{name} without --inputs: give the file with the measured inputs too")
        energy = SecondMoment.isotropic(config.input_std).output_energy(weight.tensor)
        return LayerInputs(
            isotropic_coordinates(weight.tensor),
            Metric(),
            energy / len(weight.tensor),
            energy,
            {"kind": ISOTROPIC, "std": config.input_std},
            (ISOTROPIC_NOTE,),
        )
    if config.input_std != 1.0:
        raise UsageError(f"--input_std {config.input_std:g} together with --inputs: give one or the other")
    given = read_input_moments(
        config.inputs, weight.tensor.shape[1], config.inputs_key, config.val_split, weight_key=weight.key
    )
    if config.sampling == "fixed" and given.samples is None:
        raise UsageError(f"--sampling fixed needs raw samples, and {config.inputs} holds moments; use --sampling auto")
    return _measured(given, weight.tensor, chain, config)


def _measured(given: Calibration, weight: torch.Tensor, chain: Chain, config: TrainingFlags) -> LayerInputs:
    kind = LossMetric(config.loss_metric or LossMetric.OUTPUT_ENERGY)
    is_model_loss = kind is LossMetric.MODEL_LOSS
    if is_model_loss and given.gradients is None:
        raise UsageError(
            f"{config.inputs} comes without gradients of the loss of the model, which --loss_metric model_loss and "
            "--target_loss_increase need; collect moments with loss=… (ks.collect_input_moments), or leave the flag out"
        )
    moment, centre = SecondMoment(given.train.second_moment), given.train.mean if config.fit_bias else None
    around = moment if centre is None else _centred(given, config.inputs)
    outputs, held_out_outputs = (
        None if sums is None else SecondMoment(sums.second_moment)
        for sums in (given.gradients, given.held_out_gradients or given.gradients)
    )
    metric = Metric(around, outputs)
    metric.check_shape(weight)
    divisor = 2 if is_model_loss else len(weight)  # half the form is the increase of the loss; or energy per output
    loss = Metric(moment, outputs if is_model_loss else None).loss(weight)
    held_out, held_out_loss = None, None
    if given.held_out is not None:
        held_out = Metric(_around(given.held_out, centre), held_out_outputs)
        held_out_loss = given.metric(kind, held_out=True).loss(weight) / divisor
    model, held_out_model = (None, None) if outputs is None else (metric, held_out)
    if not is_model_loss:
        metric, held_out = Metric(around), held_out and Metric(held_out.inputs)
    coordinates, inside = measured_coordinates(chain, (loss / len(weight)) ** 0.5, metric, centre)
    count, held_out_count = given.train.count, given.held_out.count if given.held_out else 0
    description = {
        "kind": MEASURED,
        "key": given.key,
        "sha256": given.sha256,
        "count": count,
        "held_out_count": held_out_count,
        "effective_rank": moment.effective_rank,
        "centred": config.fit_bias,
    }
    if is_model_loss:
        description |= {"gradients_sha256": given.gradients_sha256, "damping": metric.damping}
    name = f" {one_line(given.key)}" if given.key else ""
    notes = [
        f"Using the measured inputs of {one_line(config.inputs)}{name}: {count} inputs and {held_out_count} held out, "
        f"effective rank {moment.effective_rank:.1f} of {weight.shape[1]}."
    ]
    if is_model_loss:
        unit = f" ({given.unit})" if given.unit else ""
        notes.append(f"Losses are the predicted increase of the loss of the model{unit} per token.")
    elif outputs is not None:
        notes.append("These inputs come with gradients; --loss_metric model_loss minimises what the model loses.")
    notes += given.notes
    if given.transposed and not config.transpose:
        notes.append("The model of these inputs stores the weight as (in, out): give --transpose if the file does too.")
    rows = given.samples[: given.train.count] if config.sampling == "fixed" and given.samples is not None else None
    return LayerInputs(
        coordinates,
        inside,
        loss / divisor,
        moment.output_energy(weight),
        description,
        tuple(notes),
        loss_metric=kind,
        held_out=held_out,
        held_out_predict_zero_loss=held_out_loss,
        model_metric=model,
        held_out_model_metric=held_out_model,
        unit="" if outputs is None else given.unit,
        given=rows,
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


def _around(part: VectorSums, centre: torch.Tensor | None) -> torch.Tensor:
    """Return the second moment of x − μ: C − m μᵀ − μ mᵀ + μ μᵀ with m the mean of x; C − μ μᵀ if m is μ."""
    if centre is None:
        return part.second_moment
    cross = part.mean.outer(centre)
    moment = part.second_moment - cross - cross.t() + centre.outer(centre)
    return (moment + moment.t()) / 2
