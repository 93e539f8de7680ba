"""The learning problem that the flags describe, checked before anything is written or started."""

from dataclasses import dataclass

import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.population_loss import population_loss
from ks.chain.backend import choose_impl
from ks.chain.patterns import Chain, make_chain
from ks.cli.flags import ChainFlags, TrainingFlags
from ks.errors import UsageError
from ks.files.memory import check_fits
from ks.files.weights import Weight, load_weight
from ks.layer import KSLinear
from ks.moments.second_moment import SecondMoment
from ks.training.choose_optimizer import choose_optimizer
from ks.training.edits import TOOLKIT, Edits
from ks.training.layer_inputs import LayerInputs, layer_inputs
from ks.training.trackers import check_installed
from ks.training.whitening import Coordinates, isotropic_coordinates


@dataclass(frozen=True)
class Problem:
    """A dense weight W (m × n) that a family of chains learns from inputs of second moment C = E[x xᵀ].

    Everything inside is in internal coordinates (`ks.training.whitening`), in which the zero predictor has a loss of 1
    whatever the scale of W and x: losses and floors are relative. Only results are converted, by the factor
    `predict_zero_loss` = tr(W C Wᵀ) / m.
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
    def moment(self) -> SecondMoment:
        """Return the second moment of the inputs in internal coordinates."""
        return self.layer_inputs.moment

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
        coordinates, _ = isotropic_coordinates(self.weight.tensor)
        return coordinates.weight(self.weight.tensor.to(self.device, torch.float64, copy=True))

    def held_out_loss(self, model: KSLinear) -> float:
        """Return the exact relative loss of a chain of internal coordinates on the held-out inputs."""
        assert self.layer_inputs.held_out is not None
        outside = self.coordinates.outside(model)
        weight = self.weight.tensor.to(outside.factors[0].device)
        loss = population_loss(weight, outside.factors, self.layer_inputs.held_out)
        return loss / self.predict_zero_loss

    def held_out_energies(self) -> torch.Tensor:
        """Return E[x'_j²] of every feature of the held-out inputs in internal coordinates, shape (n,), float64."""
        assert self.layer_inputs.held_out is not None
        return self.coordinates.energies(self.layer_inputs.held_out.matrix)

    def save(self, model: KSLinear, path) -> None:
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
            "inputs": self.layer_inputs.description,
            "predict_zero_loss": self.predict_zero_loss,
            "held_out_predict_zero_loss": self.layer_inputs.held_out_predict_zero_loss,
            "dense_parameters": self.rows * self.cols,
            "device": str(self.device),
            "sampling": self.sampling,
            "optimizer": self.optimizer,
        }


def resolve(config: TrainingFlags, edits: Edits = TOOLKIT) -> Problem:
    """Load the weight and replace every 'auto' by its value.

    Args:
        config: of the run or the sweep.
        edits: the criterion and the metrics of the training script.
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
    num_train, num_validation = split_samples(config, inputs.given_count)
    check_samples_fit(num_train + num_validation, rows, cols)
    sampling, sampling_reason = choose_sampling(config.sampling, num_train, cols)
    if config.init == "hierarchical" and (reason := no_floor_reason(chain)):
        raise UsageError(f"--init hierarchical: {reason}; use --init random")
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
            _note_on_criterion(edits, optimizer)
            if not edits.criterion_is_ours
            else f"optimizer {optimizer}: {optimizer_reason}",
        ),
    )


def _note_on_criterion(edits: Edits, optimizer: str) -> str:
    return (
        f"criterion {edits.criterion}: {optimizer} trains; floors, exact losses and verdicts are left out, because "
        "they hold for mean_squared_error alone; outputs are in units of the root mean square of W x"
    )


def chain_notes(chain: Chain) -> list[str]:
    """Return saturation, parity with dense, and why a chain family has no floor, one sentence each."""
    notes = [f"saturation: from rank {chain.saturation_rank} on, more rank changes nothing"]
    if parity := chain.parity_rank():
        notes.append(f"parity: from rank {parity} on, the chain has as many parameters as the dense weight")
    if reason := no_floor_reason(chain):
        notes.append(f"no floor: {reason}")
    return notes


def chain_of(config: ChainFlags, rows: int, cols: int) -> Chain:
    """Return the chain family that the flags name, for an m × n weight.

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
    """Return the device that --device names; auto is the GPU if there is one.

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

    Args:
        config: with batch size, number of samples and fraction for validation.
        given: number of raw training samples that a file gives; `--sampling fixed` trains on them.
    Raises:
        UsageError: not one batch is left for training.
    """
    num_validation = max(1, round(config.num_samples * config.val_split))
    not_held_out = config.num_samples - num_validation
    if given is not None and config.sampling == "fixed":
        not_held_out = given
    num_train = not_held_out // config.batch_size * config.batch_size
    if num_train == 0 and given is not None and config.sampling == "fixed":
        raise UsageError(
            f"{given} training samples in {config.inputs} do not fill one batch of {config.batch_size}; lower "
            "--batch_size"
        )
    if num_train == 0:
        raise UsageError(
            f"{not_held_out} training samples ({config.num_samples} less --val_split {config.val_split}) do not fill "
            f"one batch of {config.batch_size}; raise --num_samples or lower --batch_size"
        )
    return num_train, num_validation


def check_samples_fit(num_samples: int, rows: int, cols: int) -> None:
    """Refuse more samples than the memory holds: inputs, targets, and a copy of both in work, 4 bytes a value.

    Raises:
        UsageError: they do not fit.
    """
    needed = 2 * 4 * num_samples * (rows + cols)
    check_fits(f"--num_samples {num_samples} for a {rows} × {cols} weight", needed, "lower it")


def choose_sampling(sampling: str, num_train: int, in_features: int) -> tuple[str, str]:
    """Choose how to draw the training inputs.

    Returns:
        (whitened, fresh or fixed; the reason).
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
