"""The learning problem that the flags describe, checked before anything is written or started."""

from dataclasses import dataclass, replace

import torch

from ks.bounds.floors import no_floor_reason
from ks.bounds.moments import Inputs, IsotropicInputs
from ks.cli.flags import ChainFlags, TrainingFlags
from ks.errors import UsageError
from ks.files.memory import check_fits
from ks.files.weights import Weight, load_weight
from ks.patterns import Chain, make_chain
from ks.product.backend import check_impl
from ks.product.pieces import sum_of_squares
from ks.training.choose_optimiser import choose_optimiser


@dataclass(frozen=True)
class Problem:
    """A dense weight W (m × n) that a family of chains learns from inputs of second moment C = E[x xᵀ].

    Everything inside is in internal units, in which predicting 0 has a loss of 1 whatever the scale of W and x: the
    weight is W / unit, `inputs` has σ = 1, and losses and floors are relative. Only results are converted, by the
    factor `predict_zero_loss` = tr(W C Wᵀ) / m.
    """

    weight: Weight
    chain: Chain
    device: torch.device
    sampling: str
    optimizer: str
    num_train: int
    num_validation: int
    inputs: Inputs
    unit: float
    predict_zero_loss: float
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.weight.tensor.shape[0]

    @property
    def cols(self) -> int:
        return self.weight.tensor.shape[1]

    def internal_weight(self) -> torch.Tensor:
        """Return W / unit in float64 on the training device."""
        return self.weight.tensor.to(self.device, torch.float64, copy=True).div_(self.unit)

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
            "unit": self.unit,
            "predict_zero_loss": self.predict_zero_loss,
            "dense_parameters": self.rows * self.cols,
            "device": str(self.device),
            "sampling": self.sampling,
            "optimizer": self.optimizer,
        }


def resolve(config: TrainingFlags) -> Problem:
    """Load the weight and replace every 'auto' by its value.

    Raises:
        UsageError: bad weight, chain, device, backend or sample counts.
    """
    device = choose_device(config.device)
    check_impl(config.impl, device)
    weight = load_weight(config.weight_path, config.weight_key, config.transpose)
    rows, cols = weight.tensor.shape
    chain = chain_of(config, rows, cols)
    num_train, num_validation = split_samples(config)
    check_samples_fit(config.num_samples, rows, cols)
    sampling, sampling_reason = choose_sampling(config.sampling, num_train, cols)
    if config.init == "hierarchical" and (reason := no_floor_reason(chain)):
        raise UsageError(f"--init hierarchical: {reason}; use --init random")
    optimizer, optimizer_reason = choose_optimiser(config.optimizer, chain)
    inputs = IsotropicInputs(config.input_std)
    unit = (sum_of_squares(weight.tensor) / rows) ** 0.5
    predict_zero_loss = inputs.output_energy(weight.tensor) / rows
    if not 1e-280 < predict_zero_loss < 1e280:
        raise UsageError(
            f"--input_std {config.input_std:g} on a weight of norm {unit * rows**0.5:g}: the loss of predicting 0 is "
            f"{predict_zero_loss:g}; 1e-280 to 1e280 is allowed: scale one of them"
        )
    return Problem(
        weight=weight,
        chain=chain,
        device=device,
        sampling=sampling,
        optimizer=optimizer,
        num_train=num_train,
        num_validation=num_validation,
        inputs=replace(inputs, std=1.0),
        unit=unit,
        predict_zero_loss=predict_zero_loss,
        notes=(
            *chain.notes(),
            f"sampling {sampling}: {sampling_reason}",
            f"optimizer {optimizer}: {optimizer_reason}",
        ),
    )


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


def split_samples(config: TrainingFlags) -> tuple[int, int]:
    """Return the numbers of training samples, in whole batches, and of validation samples.

    Raises:
        UsageError: not one batch is left for training.
    """
    num_validation = max(1, round(config.num_samples * config.val_split))
    not_held_out = config.num_samples - num_validation
    num_train = not_held_out // config.batch_size * config.batch_size
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
