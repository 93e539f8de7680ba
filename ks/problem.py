"""The learning problem that the flags name, checked and resolved before anything is written or started."""

import math
from dataclasses import dataclass

import torch

from ks import cli
from ks.chain import check_impl
from ks.factorize import no_floor_reason
from ks.patterns import Chain
from ks.step import choose_sampling
from ks.weights import Weight, load_weight


@dataclass(frozen=True)
class Problem:
    """A dense weight W (m × n) to be learned by a family of chains from inputs x ~ N(0, σ²I).

    Training works in internal units: inputs of variance 1 and W / unit with unit = ‖W‖_F / √m, so that predicting 0
    has a loss of 1 whatever the scale of W. Times `predict_zero_loss` = (σ · unit)², losses are in the user's units.
    """

    weight: Weight
    chain: Chain
    device: torch.device
    sampling: str
    num_train: int
    num_validation: int
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
        """W / unit in float64 on the training device."""
        return self.weight.tensor.to(self.device, torch.float64) / self.unit

    def describe(self) -> dict:
        """What the problem is, for config files; the hash identifies the weight."""
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
        }


def resolve(config) -> Problem:
    """Load the weight and resolve every 'auto'.

    Args:
        config: a parsed command line with the shared training flags.
    Raises:
        ValueError: bad weight, chain, device, backend or sample counts, in one line.
    """
    device = cli.device_of(config.device)
    check_impl(config.impl, device)
    weight = load_weight(config.weight_path, config.weight_key, config.transpose)
    rows, cols = weight.tensor.shape
    chain = cli.chain_of(config, rows, cols)
    num_validation = max(1, round(config.num_samples * config.val_split))
    not_held_out = config.num_samples - num_validation
    num_train = not_held_out // config.batch_size * config.batch_size
    if num_train == 0:
        raise ValueError(
            f"{not_held_out} training samples ({config.num_samples} less --val_split {config.val_split}) do not fill "
            f"one batch of {config.batch_size}; raise --num_samples or lower --batch_size"
        )
    sampling, sampling_reason = choose_sampling(config.sampling, num_train, cols)
    if config.init == "hierarchical" and (reason := no_floor_reason(chain)):
        raise ValueError(f"--init hierarchical: {reason}; use --init random")
    unit = (weight.tensor.double().norm() / rows**0.5).item()
    predict_zero_loss = config.input_std * unit * config.input_std * unit
    if not 0 < predict_zero_loss < math.inf:
        raise ValueError(
            f"--input_std {config.input_std:g} on a weight of norm {unit * rows**0.5:g}: the loss of predicting 0 is "
            f"{predict_zero_loss:g} in double precision; scale one of them"
        )
    return Problem(
        weight,
        chain,
        device,
        sampling,
        num_train,
        num_validation,
        unit,
        predict_zero_loss,
        (*chain.notes(), f"sampling {sampling}: {sampling_reason}"),
    )
