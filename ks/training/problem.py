"""The learning problem that the flags describe: weight, chain, inputs, samples; checked before anything is written."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.population_loss import residual
from ks.chain.backend import choose_impl
from ks.chain.patterns import Chain, make_chain
from ks.cli.flags import ChainFlags, TargetFlags, TrainingFlags
from ks.errors import UsageError
from ks.files.memory import check_fits
from ks.files.weights import Weight, load_weight
from ks.layer import KSLinear
from ks.model.prediction import per_token
from ks.moments.metric import LossMetric, Metric
from ks.moments.second_moment import SecondMoment
from ks.training.choose_optimizer import choose_optimizer
from ks.training.criterion_identity import TOOLKIT, Edits
from ks.training.layer_inputs import LayerInputs, layer_inputs
from ks.training.trackers import check_installed
from ks.training.whitening import Coordinates, isotropic_coordinates

Pair = tuple[torch.Tensor, torch.Tensor]  # inputs and their targets, one sample a row


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
        return self.layer_inputs.unit

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
        return self.layer_inputs.held_out.loss(self._error(model)) / self.rows / self.coordinates.unit**2

    def effects(self, model: KSLinear) -> dict[str, float | None]:
        """Return what a chain of internal coordinates costs as it is saved, whichever metric trained it.

        Returns:
            loss_increase and held_out_loss_increase, ½ tr(G E C Eᵀ) per token with E = W − Ŵ, and energy_loss, the
            fraction of the output energy that is lost; nothing without gradients.
        """
        metric, held_out = self.layer_inputs.model_metric, self.layer_inputs.held_out_model_metric
        if metric is None:
            return {}
        error = self._error(model)
        return {
            "loss_increase": metric.loss(error) / 2,
            "held_out_loss_increase": None if held_out is None else held_out.loss(error) / 2,
            "energy_loss": metric.inputs.output_energy(error) / self.layer_inputs.output_energy,
        }

    def _error(self, model: KSLinear) -> torch.Tensor:
        """Return W − Ŵ in the user's coordinates, float64, for a chain of internal coordinates."""
        values = self.coordinates.outside(model).factors
        return residual(self.weight.tensor.to(values[0].device), values)

    @cached_property
    def validation_root(self) -> torch.Tensor | None:
        """Return G^{1/2} in internal coordinates, of held-out gradients if there are any; None where it is I.

        Predictions and targets of validation samples are multiplied by it, so that the mean squared error is the loss.

        Returns:
            symmetric, shape (m, m), float64, on the CPU.
        """
        outputs, held_out = self.metric.outputs, self.layer_inputs.held_out
        if held_out is not None and held_out.kind is LossMetric.MODEL_LOSS:
            outputs = SecondMoment(self.coordinates.gradients(held_out))
        return None if outputs.is_isotropic else outputs.times_root(torch.eye(self.rows, dtype=torch.float64))

    def held_out_samples(self) -> Pair | None:
        """Return n samples x' whose second moment is that of the held-out inputs, and their targets, float64."""
        if self.layer_inputs.held_out is None:
            return None
        unit = torch.eye(self.cols, dtype=torch.float64).mul_(self.cols**0.5)
        return self._inside(self.layer_inputs.held_out.inputs.transform(unit))

    def held_out_energies(self) -> torch.Tensor:
        """Return the mean squares of the held-out inputs x', shape (n,), float64."""
        assert self.layer_inputs.held_out is not None
        half = self.coordinates.samples(self.layer_inputs.held_out.inputs.matrix)
        return self.coordinates.samples(half.mT).diagonal()

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
            f"--target_loss_increase {increase:g}: the zero predictor costs {per_token(zero, problem.unit)} by the "
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
