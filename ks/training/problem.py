"""The learning problem that the flags describe: weight, chain, inputs, samples; checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.population_loss import population_loss
from ks.chain.backend import choose_impl
from ks.chain.patterns import Chain, make_chain
from ks.cli.flags import ChainFlags, TargetFlags, TrainingFlags
from ks.errors import UsageError, one_line
from ks.files.columns import ISOTROPIC
from ks.files.memory import check_fits
from ks.files.weights import Weight, load_weight
from ks.layer import KSLinear
from ks.moments.metric import LossMetric, Metric
from ks.moments.read import Calibration, read_input_moments
from ks.moments.second_moment import UNIT_MOMENT, SecondMoment, VectorSums
from ks.training.choose_optimizer import choose_optimizer
from ks.training.criterion_identity import TOOLKIT, Edits
from ks.training.trackers import check_installed
from ks.training.whitening import Coordinates, isotropic_coordinates, measured_coordinates

MEASURED = "measured"
SMALLEST_VARIANCE = 1e-12  # of the mean square of the inputs; float64 sums keep about three digits of it

Pair = tuple[torch.Tensor, torch.Tensor]  # inputs and their targets, one sample a row
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
        description: for config files; it identifies the inputs.
        notes: remarks for the user, a line each.
        loss_metric: the kind of the metric.
        held_out: the metric of held-out inputs around the same centre, in the user's coordinates; None if there are
            none.
        held_out_predict_zero_loss: loss of the zero predictor on held-out inputs.
        given: raw samples to train on, shape (N, n); None unless --sampling is fixed.
        effects: losses that every trained chain has too; None without gradients of the loss of the model.
    """

    coordinates: Coordinates
    metric: Metric
    predict_zero_loss: float
    description: dict[str, Any]
    notes: tuple[str, ...]
    loss_metric: LossMetric = LossMetric.OUTPUT_ENERGY
    held_out: Metric | None = None
    held_out_predict_zero_loss: float | None = None
    given: torch.Tensor | None = None
    effects: "Effects | None" = None


@dataclass(frozen=True)
class Effects:
    """What an error of the weight does to the model, whichever metric a chain is trained by.

    Args:
        model_loss: G ⊗ C with C around the centre.
        held_out: the same of the held-out part; None if there is none.
        energy: tr(W C Wᵀ) with C around 0.
        unit: of the loss of the model.
    """

    model_loss: Metric
    held_out: Metric | None
    energy: float
    unit: str

    def of_chain(self, weight: torch.Tensor, values: list[torch.Tensor]) -> dict[str, float | None]:
        """Return loss_increase and held_out_loss_increase, ½ tr(G E C Eᵀ) per token with E = W − K_1 … K_L, and
        energy_loss, the fraction of the output energy that is lost.

        Args:
            weight: W, shape (m, n).
            values: of the factors, which act on x and give y.
        """

        def loss(metric: Metric | SecondMoment) -> float:
            return population_loss(weight, values, metric) * len(weight)

        return {
            "loss_increase": loss(self.model_loss) / 2,
            "held_out_loss_increase": None if self.held_out is None else loss(self.held_out) / 2,
            "energy_loss": loss(self.model_loss.inputs) / self.energy,
        }


@dataclass(frozen=True)
class Problem:
    """A dense weight W (m × n) that a family of chains learns from inputs of second moment C = E[x xᵀ].

    Everything inside is in internal coordinates (`ks.training.whitening`), in which the zero predictor has a loss of 1
    whatever the scale of W and x: losses and floors are relative. Only results are converted, by the factor
    `predict_zero_loss`: tr(W C Wᵀ) / m for output energy, ½ tr(G W C Wᵀ) for the loss of the model, G damped.
    """

    weight: Weight
    chain: Chain
    device: torch.device
    sampling: str
    optimizer: str
    num_train: int
    num_validation: int
    layer_inputs: LayerInputs
    edits: Edits
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.weight.tensor.shape[0]

    @property
    def cols(self) -> int:
        return self.weight.tensor.shape[1]

    @property
    def coordinates(self) -> Coordinates:
        return self.layer_inputs.coordinates

    @property
    def metric(self) -> Metric:
        """Return the metric of an error in internal coordinates; its loss of W is m."""
        return self.layer_inputs.metric

    @property
    def loss_metric(self) -> LossMetric:
        """Return what is minimised."""
        return self.layer_inputs.loss_metric

    @property
    def unit(self) -> str:
        """Return the unit of the loss of the model, as nats; empty without gradients."""
        effects = self.layer_inputs.effects
        return "" if effects is None else effects.unit

    @property
    def predict_zero_loss(self) -> float:
        return self.layer_inputs.predict_zero_loss

    @property
    def unit_of_loss(self) -> float:
        """Return the factor from a loss in internal units to the reported one; a criterion of the user's has none."""
        return self.predict_zero_loss if self.edits.criterion_is_ours else 1.0

    def internal_weight(self) -> torch.Tensor:
        """Return W in internal coordinates, in float64 on the training device."""
        return self.coordinates.weight(self.weight.tensor.to(self.device, torch.float64, copy=True))

    def isotropic_weight(self) -> torch.Tensor:
        """Return W in float64, scaled so that the zero predictor has a loss of 1 under second moment I."""
        weight = self.weight.tensor
        return isotropic_coordinates(weight).weight(weight.to(self.device, torch.float64, copy=True))

    def held_out_loss(self, model: KSLinear) -> float:
        """Return the exact loss of a chain of internal coordinates on the held-out inputs, in internal units."""
        assert self.layer_inputs.held_out is not None
        weight, values = self._outside(model)
        return population_loss(weight, values, self.layer_inputs.held_out) / self.coordinates.unit**2

    def effects(self, model: KSLinear) -> dict[str, float | None]:
        """Return the losses in `Effects` of a chain of internal coordinates as it is saved; none without gradients."""
        effects = self.layer_inputs.effects
        return {} if effects is None else effects.of_chain(*self._outside(model))

    def _outside(self, model: KSLinear) -> tuple[torch.Tensor, list[torch.Tensor]]:
        values = self.coordinates.outside(model).factors
        return self.weight.tensor.to(values[0].device), values

    def output_root(self, held_out: bool = False) -> torch.Tensor | None:
        """Return G^{1/2} in internal coordinates, by which predictions and targets are multiplied, so that their mean
        squared error is the loss; None where it is I.

        Args:
            held_out: that of the held-out gradients, if there are any, which validation uses.
        Returns:
            symmetric, shape (m, m), float64, on the CPU.
        """
        outputs = self.metric.outputs
        if held_out and self.loss_metric is LossMetric.MODEL_LOSS and self.layer_inputs.held_out is not None:
            outputs = SecondMoment(self.coordinates.gradients(self.layer_inputs.held_out))
        return None if outputs.is_isotropic else outputs.times_root(torch.eye(self.rows, dtype=torch.float64))

    def held_out_samples(self) -> Pair | None:
        """Return n samples x' whose second moment is that of the held-out inputs, and their targets, float64."""
        if self.layer_inputs.held_out is None:
            return None
        unit = torch.eye(self.cols, dtype=torch.float64).mul_(self.cols**0.5)
        samples, targets = self._inside(self.layer_inputs.held_out.inputs.transform(unit))
        root = self.output_root(held_out=True)
        return samples, targets if root is None else targets @ root

    def given_samples(self) -> Pair | None:
        """Return the raw samples to train on as x', and their targets y', float64; None unless sampling is fixed."""
        given, centre = self.layer_inputs.given, self.coordinates.centre
        if given is None:
            return None
        return self._inside(given.double() if centre is None else given.double() - centre)

    def _inside(self, samples: torch.Tensor) -> Pair:
        weight = self.coordinates.outputs(self.weight.tensor.double().cpu())
        return self.coordinates.samples(samples), samples @ weight.t() / self.coordinates.unit

    def save(self, model: KSLinear, path: Path) -> None:
        """Save a chain of internal coordinates as one that acts on x."""
        self.coordinates.save(model, self.weight.tensor, path)

    def describe(self) -> dict:
        """Return the problem for config files; the hash identifies the weight."""
        return {
            "weight": {
                "shape": [self.rows, self.cols],
                "key": self.weight.key,
                "dtype": str(self.weight.tensor.dtype).removeprefix("torch."),
                "sha256": self.weight.sha256(),
            },
            "chain": self.chain.describe(),
            "unit": self.coordinates.unit,
            "loss_metric": self.loss_metric.value,
            "unit_of_model_loss": self.unit,
            "inputs": self.layer_inputs.description,
            "predict_zero_loss": self.predict_zero_loss,
            "held_out_predict_zero_loss": self.layer_inputs.held_out_predict_zero_loss,
            "dense_parameters": self.rows * self.cols,
            "device": str(self.device),
            "sampling": self.sampling,
            "optimizer": self.optimizer,
        }


def resolve(config: TrainingFlags, edits: Edits = TOOLKIT) -> Problem:
    """Load the weight and replace every 'auto' by its value; `edits` are those of the training script.

    Raises:
        UsageError: bad weight, chain, device, backend or sample counts, or a tracker that is not installed.
    """
    device = choose_device(config.device)
    if device.type == "cuda":  # streams, graphs and kernels go to the current device
        torch.cuda.set_device(device)
    choose_impl(config.impl, device)
    check_installed(config.log_to)
    weight = load_weight(config.weight_path, config.weight_key, config.transpose)
    rows, cols = weight.tensor.shape
    chain = chain_of(config, rows, cols)
    inputs = layer_inputs(config, weight, chain)
    num_train, num_validation = split_samples(config, None if inputs.given is None else len(inputs.given))
    num_samples = num_train + num_validation
    needed = 2 * 4 * num_samples * (rows + cols)  # inputs, targets, and a copy of both in work, 4 bytes a value
    check_fits(f"--num_samples {num_samples} for a {rows} × {cols} weight", needed, "lower it")
    sampling, sampling_reason = choose_sampling(config.sampling, num_train, cols)
    if config.init == "hierarchical" and (reason := no_floor_reason(chain)):
        raise UsageError(f"--init hierarchical: {reason}; use --init random")
    if config.loss_metric == LossMetric.MODEL_LOSS and not edits.criterion_is_ours:
        raise UsageError(
            "--loss_metric model_loss needs the criterion mean_squared_error of the toolkit, and that of "
            f"train_with_random.py is {edits.criterion}; leave the flag out"
        )
    optimizer, optimizer_reason = choose_optimizer(config.optimizer, chain, edits)
    if not 1e-280 < inputs.predict_zero_loss < 1e280:
        raise UsageError(
            f"{f'--inputs {config.inputs}' if config.inputs else f'--input_std {config.input_std:g}'} on this weight: "
            f"the zero predictor has a loss of {inputs.predict_zero_loss:g}; 1e-280 to 1e280 is allowed; "
            "scale the weight or the inputs"
        )
    return Problem(
        weight=weight,
        chain=chain,
        device=device,
        sampling=sampling,
        optimizer=optimizer,
        num_train=num_train,
        num_validation=num_validation,
        layer_inputs=inputs,
        edits=edits,
        notes=(
            *inputs.notes,
            *chain.notes(),
            f"sampling {sampling}: {sampling_reason}",
            f"optimizer {optimizer}: {optimizer_reason}"
            if edits.criterion_is_ours
            else f"criterion {edits.criterion}: {optimizer} trains; floors, exact losses and verdicts are left out, "
            "because they hold for mean_squared_error alone; outputs are in units of the root mean square of W x",
        ),
    )


def relative_target(config: TargetFlags, problem: Problem) -> float | None:
    """Return the target of a sweep as a fraction of the loss of the zero predictor; None without one.

    Raises:
        UsageError: --target_loss_increase that the zero predictor reaches.
    """
    increase, zero = config.target_loss_increase, problem.predict_zero_loss
    if increase is None:
        return config.target_relative_loss
    if increase >= zero:
        raise UsageError(
            f"--target_loss_increase {increase:g}: the zero predictor costs {zero:.3g} {problem.unit} per token by the "
            "same prediction, so that every rank reaches it; give less"
        )
    return increase / zero


def chain_notes(chain: Chain) -> list[str]:
    """Return saturation, parity with dense, and why a chain family has no floor, one sentence each."""
    notes = [f"saturation: from rank {chain.saturation_rank} on, more rank changes nothing"]
    if parity := chain.parity_rank():
        notes.append(f"parity: from rank {parity} on, the chain has as many parameters as the dense weight")
    if reason := no_floor_reason(chain):
        notes.append(f"no floor: {reason}")
    return notes


def chain_of(config: ChainFlags, rows: int, cols: int) -> Chain:
    """Return the chain family for the flags and an m × n weight.

    Raises:
        UsageError: splits together with --chain, or splits that do not fit.
    """
    splits = config.row_splits is not None or config.col_splits is not None
    if splits and config.chain is not None:
        raise UsageError(f"--chain {config.chain} together with --row_splits or --col_splits: give one or the other")
    return make_chain(
        rows,
        cols,
        config.chain or "monarch",
        blocks=config.blocks,
        num_factors=config.num_factors,
        row_splits=config.row_splits,
        col_splits=config.col_splits,
    )


def choose_device(name: str) -> torch.device:
    """Return the device for --device; auto is the GPU if there is one.

    Raises:
        UsageError: not a device name, or a device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu or auto"
        )
    return device


def split_samples(config: TrainingFlags, given: int | None) -> tuple[int, int]:
    """Return the numbers of training samples, in whole batches, and of validation samples.

    `given` is the number of raw samples to train on; None to draw them.

    Raises:
        UsageError: not one batch is left for training.
    """
    num_validation = max(1, round(config.num_samples * config.val_split))
    available = config.num_samples - num_validation if given is None else given
    if available < config.batch_size:
        origin, remedy = f"({config.num_samples} less --val_split {config.val_split})", "raise --num_samples or lower"
        if given is not None:
            origin, remedy = f"in {config.inputs}", "lower"
        raise UsageError(
            f"{available} training samples {origin} do not fill one batch of {config.batch_size}; {remedy} --batch_size"
        )
    return available // config.batch_size * config.batch_size, num_validation


def choose_sampling(sampling: str, num_train: int, in_features: int) -> tuple[str, str]:
    """Return how to draw the training inputs (whitened, fresh or fixed), and the reason.

    Raises:
        UsageError: whitened with fewer training samples than input features.
    """
    if sampling == "whitened" and num_train < in_features:
        raise UsageError(
            f"--sampling whitened needs at least {in_features} training samples (the input features), {num_train} are "
            "left in whole batches after --val_split; raise --num_samples or use --sampling fresh"
        )
    if sampling != "auto":
        return sampling, "as asked"
    if num_train >= in_features:
        return "whitened", f"{num_train} training samples suffice for {in_features} input features"
    return "fresh", f"{num_train} training samples are fewer than {in_features} input features"


def layer_inputs(config: TrainingFlags, weight: Weight, chain: Chain) -> LayerInputs:
    """Return the inputs for the flags.

    Raises:
        UsageError: flags that do not go together, or a file that does not fit the weight.
    """
    if config.inputs is None:
        wants_model_loss = config.loss_metric == LossMetric.MODEL_LOSS
        needing = {
            "inputs_key": config.inputs_key,
            "fit_bias": config.fit_bias,
            "loss_metric model_loss": wants_model_loss,
        }
        for name, is_given in needing.items():
            if is_given:
                raise UsageError(f"--{name} without --inputs: give the file with the measured inputs too")
        zero_loss = SecondMoment.isotropic(config.input_std).output_energy(weight.tensor) / len(weight.tensor)
        description = {"kind": ISOTROPIC, "std": config.input_std}
        coordinates = isotropic_coordinates(weight.tensor)
        return LayerInputs(coordinates, Metric(UNIT_MOMENT), zero_loss, description, (ISOTROPIC_NOTE,))
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
    moment, centre = SecondMoment(given.train.second_moment), given.train.mean if config.fit_bias else None
    around = moment if centre is None else _centred(given, config.inputs)
    gradients, held_out_gradients = (
        None if sums is None else SecondMoment(sums.second_moment)
        for sums in (given.gradients, given.held_out_gradients or given.gradients)
    )
    if is_model_loss and gradients is None:
        raise UsageError(
            f"{config.inputs} comes without gradients of the loss of the model, which --loss_metric model_loss and "
            "--target_loss_increase need; collect moments with loss=… (ks.collect_input_moments), or leave the flag out"
        )
    effects, held_out, held_out_loss = None, None, None
    divisor = 2 if is_model_loss else len(weight)  # half the form is the increase of the loss; or energy per output
    loss = Metric(moment, gradients if is_model_loss else None).loss(weight)
    metric = Metric(around, gradients)
    metric.check_shape(weight)
    if given.held_out is not None:
        uncentred = SecondMoment(given.held_out.second_moment)
        held_out = Metric(
            uncentred if centre is None else SecondMoment(_around(given.held_out, centre)), held_out_gradients
        )
        held_out_loss = Metric(uncentred, held_out_gradients if is_model_loss else None).loss(weight) / divisor
    if gradients is not None:
        effects = Effects(metric, held_out, moment.output_energy(weight), given.unit)
    if not is_model_loss:
        metric, held_out = Metric(around), None if held_out is None else Metric(held_out.inputs)
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
    note = (
        f"Using the measured inputs of {one_line(config.inputs)}{name}: {count} inputs and {held_out_count} held out, "
        f"effective rank {moment.effective_rank:.1f} of {weight.shape[1]}."
    )
    notes = [note, *_gradient_notes(given, kind), *given.notes]
    if given.transposed and not config.transpose:
        notes.append("The model of these inputs stores the weight as (in, out): give --transpose if the file does too.")
    rows = given.samples[: given.train.count] if config.sampling == "fixed" and given.samples is not None else None
    zero_loss = loss / divisor
    return LayerInputs(
        coordinates, inside, zero_loss, description, tuple(notes), kind, held_out, held_out_loss, rows, effects
    )


def _gradient_notes(given: Calibration, kind: LossMetric) -> list[str]:
    if kind is LossMetric.MODEL_LOSS:
        unit = given.unit or "the unit of the loss"
        return [f"Losses are the predicted increase of the loss of the model, in {unit} per token."]
    hint = "These inputs come with gradients; --loss_metric model_loss minimises what the model loses."
    return [] if given.gradients is None else [hint]


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


def _around(part: VectorSums, centre: torch.Tensor) -> torch.Tensor:
    """Return the second moment of x − μ: C − m μᵀ − μ mᵀ + μ μᵀ with m the mean of x; C − μ μᵀ if m is μ."""
    cross = part.mean.outer(centre)
    moment = part.second_moment - cross - cross.t() + centre.outer(centre)
    return (moment + moment.t()) / 2
