"""Samples (whitened, fresh or fixed) and one optimiser step; nothing here reads the device back to the host.

The optimisers are the fused kernels under `torch.optim`: building a `torch.optim.Optimizer` imports dynamo, which
would double the start-up of every training subprocess.
"""

import math

import torch

# A value of a factor has the natural size 1/√c (it keeps the variance of its input). One Adam step of learning rate lr
# moves it by RELATIVE_STEP · lr of that, whatever rank, shape and scale. Of what was tried, this and the second-moment
# memory of 20 steps come closest to the floor at lr = 1e-3 (benchmarks/README.md).
RELATIVE_STEP = 100.0
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8
SGD_MOMENTUM = 0.9

_STREAMS = {"train": 0, "validation": 1, "shuffle": 2, "init": 3}


def useful_threads(multiply_adds: int) -> int:
    """CPU threads worth using where a forward pass costs this many multiply-adds; at most those there are.

    Below 2^25 a thread, waking another one costs more than it helps (measured at 1024 × 2048: no gain at rank 64 and
    batch 32, a factor of 1.6 at batch 256).
    """
    return max(1, min(torch.get_num_threads(), multiply_adds // 2**25))


def seeded_generator(seed: int, stream: str, epoch: int = 0, device="cpu") -> torch.Generator:
    """A generator for one purpose of one run: no draw of one stream or epoch shifts those of another."""
    mixed = (seed * len(_STREAMS) + _STREAMS[stream]) * 1_000_003 + epoch
    return torch.Generator(device).manual_seed(mixed % 2**63)


def choose_sampling(sampling: str, num_train: int, in_features: int) -> tuple[str, str]:
    """Resolve `--sampling`.

    Returns:
        (whitened, fresh or fixed; the reason).
    Raises:
        ValueError: whitened with fewer training samples than input features.
    """
    if sampling == "whitened" and num_train < in_features:
        raise ValueError(
            f"--sampling whitened needs at least {in_features} training samples (the input features), {num_train} are "
            "left after --val_split; raise --num_samples or use --sampling fresh"
        )
    if sampling != "auto":
        return sampling, "as asked"
    if num_train >= in_features:
        return "whitened", f"{num_train} training samples suffice for {in_features} input features"
    return "fresh", f"{num_train} training samples are fewer than {in_features} input features"


def whiten(samples: torch.Tensor) -> torch.Tensor:
    """X · chol(XᵀX / N)⁻ᵀ, so that XᵀX / N = I and a full-batch loss is the population loss.

    Args:
        samples: X, shape (N, n) with N ≥ n, any float dtype.
    Returns:
        tensor of the same shape and dtype; computed in float64, since N close to n is ill-conditioned.
    """
    wide = samples.double()
    root = torch.linalg.cholesky(wide.t() @ wide / len(wide))
    whitened = torch.linalg.solve_triangular(root, wide.t(), upper=False)
    return whitened.t().to(samples.dtype, memory_format=torch.contiguous_format)


class Samples:
    """Unit Gaussian inputs x ~ N(0, I) and their targets W x, the same for every rank of a study.

    Args:
        weight: W, shape (m, n), float32, on the device to train on.
        num_train, num_validation: numbers of samples.
        batch_size: of the training batches; what does not fill a batch waits for another epoch's shuffle.
        sampling: 'whitened' (one set, second moment exactly I), 'fresh' (a new set every epoch) or 'fixed'.
        seed: of inputs and shuffles.
        batch_last: batches of shape (n, batch) instead of (batch, n).
        dtype: of the inputs; targets stay float32.

    `validation` holds batches of other samples; `validation_shares` weighs their mean losses to the mean over all.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        num_train: int,
        num_validation: int,
        batch_size: int,
        *,
        sampling: str,
        seed: int,
        batch_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.weight, self.num_train, self.batch_size = weight, num_train, batch_size
        self.sampling, self.seed, self.batch_last, self.dtype = sampling, seed, batch_last, dtype
        self.steps_per_epoch = num_train // batch_size
        inputs = self._draw(num_validation, "validation")
        self.validation = list(self._batches(inputs, inputs @ weight.t(), 1024))
        self.validation_shares = torch.tensor([y.numel() for _, y in self.validation], device=weight.device)
        self.validation_shares = self.validation_shares / self.validation_shares.sum()
        if sampling != "fresh":
            self._inputs = self._draw(num_train, "train")
            if sampling == "whitened":
                self._inputs = whiten(self._inputs)
            self._targets = self._inputs @ weight.t()

    def _draw(self, count: int, stream: str, epoch: int = 0) -> torch.Tensor:
        device = self.weight.device
        generator = seeded_generator(self.seed, stream, epoch, device)
        return torch.randn(count, self.weight.shape[1], generator=generator, device=device)

    def _batches(self, inputs, targets, batch_size):
        for x, y in zip(inputs.to(self.dtype).split(batch_size), targets.split(batch_size)):
            yield (x.t().contiguous(), y.t().contiguous()) if self.batch_last else (x, y)

    def epoch(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of epoch `number` (from 1): pairs of inputs and targets, shuffled by seed and number."""
        count = self.steps_per_epoch * self.batch_size
        if self.sampling == "fresh":
            inputs = self._draw(count, "train", number)
            targets = inputs @ self.weight.t()
        else:
            device = self.weight.device
            generator = seeded_generator(self.seed, "shuffle", number, device)
            order = torch.randperm(self.num_train, generator=generator, device=device)[:count]
            inputs, targets = self._inputs[order], self._targets[order]
        return list(self._batches(inputs, targets, self.batch_size))


class Schedule:
    """Learning rate per step.

    cosine: lr · (1 + cos(π t / T)) / 2 over the T steps of the run; plateau: times `factor` after more than `patience`
    epochs without a validation loss 1e-4 (relative) below the best; step: times `gamma` every `step_size` epochs;
    none: lr.
    """

    def __init__(self, name, lr, steps_per_epoch, num_epochs, *, patience=10, factor=0.5, step_size=30, gamma=0.1):
        self.name, self.lr, self.steps_per_epoch, self.num_epochs = name, lr, steps_per_epoch, num_epochs
        self.patience, self.factor, self.step_size, self.gamma = patience, factor, step_size, gamma
        self.best, self.bad_epochs, self.reduction = math.inf, 0, 1.0

    def rate(self, epoch: int, step: int) -> float:
        """Learning rate of step `step` (from 0) of epoch `epoch` (from 1)."""
        if self.name == "cosine":
            progress = (epoch - 1 + step / self.steps_per_epoch) / self.num_epochs
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "step":
            return self.lr * self.gamma ** ((epoch - 1) // self.step_size)
        return self.lr * self.reduction

    def end_epoch(self, validation_loss: float) -> None:
        """Tell the plateau schedule how the epoch ended."""
        if self.name != "plateau":
            return
        if validation_loss < self.best * (1 - 1e-4):
            self.best, self.bad_epochs = validation_loss, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.reduction, self.bad_epochs = self.reduction * self.factor, 0


class LossScale:
    """Dynamic loss scaling for float16: halved when a gradient overflows (the step is skipped), doubled in calm."""

    def __init__(self, device):
        self.scale = torch.full((), 2.0**16, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), device=device)

    def unscale(self, gradients) -> torch.Tensor:
        """Divide the gradients by the scale in place; returns 1.0 if one of them was not finite, else 0.0."""
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found_inf, self.scale.reciprocal())
        torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, 500)
        return self.found_inf


class Optimiser:
    """AdamW, Adam or SGD with momentum: fused, clipped, loss-scaled for float16, without a host read.

    Adam's rate is relative to the natural size of each factor's values (`RELATIVE_STEP`), SGD's is the plain one.

    Args:
        name: 'adamw', 'adam' or 'sgd'.
        parameters: values of shape (a, b, c, d), float32 leaves, updated in place.
        weight_decay: AdamW's decay per unit of lr; for the others the factor of the L2 term.
        max_grad_norm: the global gradient norm is clipped to this; 0 switches it off.
        loss_scaling: for float16.
    """

    def __init__(self, name, parameters, *, weight_decay=0.0, max_grad_norm=1.0, loss_scaling=False):
        self.name, self.parameters = name, list(parameters)
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.rate_factors = [
            1.0 if name == "sgd" else RELATIVE_STEP * parameter.shape[2] ** -0.5 for parameter in self.parameters
        ]
        device = self.parameters[0].device
        self.loss_scale = LossScale(device) if loss_scaling else None
        self.moments = [torch.zeros_like(parameter) for parameter in self.parameters]
        if name != "sgd":
            self.square_moments = [torch.zeros_like(parameter) for parameter in self.parameters]
            self.counts = [torch.zeros((), device=device) for _ in self.parameters]

    def step(self, loss: torch.Tensor, lr: float) -> torch.Tensor:
        """Backward pass and one update.

        Args:
            loss: scalar, float32.
            lr: learning rate of this step.
        Returns:
            the gradient norm before clipping, a scalar on the device.
        """
        scaled = loss if self.loss_scale is None else loss * self.loss_scale.scale
        gradients = torch.autograd.grad(scaled, self.parameters)
        found_inf = None if self.loss_scale is None else self.loss_scale.unscale(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.max_grad_norm:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        with torch.no_grad():
            self._update(gradients, lr, found_inf)
        return norm

    def _update(self, gradients, lr, found_inf):
        shared = {"maximize": False, "grad_scale": None, "found_inf": found_inf}
        if self.name == "sgd":
            shared |= {"momentum": SGD_MOMENTUM, "dampening": 0.0, "nesterov": False, "is_first_step": False}
        else:
            shared |= {"beta1": ADAM_BETAS[0], "beta2": ADAM_BETAS[1], "eps": ADAM_EPSILON, "amsgrad": False}
            torch._foreach_add_(self.counts, 1.0 if found_inf is None else 1.0 - found_inf)
        for index, factor in enumerate(self.rate_factors):
            state = [[self.parameters[index]], [gradients[index]], [self.moments[index]]]
            if self.name == "sgd":
                torch._fused_sgd_(*state, lr=lr * factor, weight_decay=self.weight_decay, **shared)
                continue
            state += [[self.square_moments[index]], [], [self.counts[index]]]
            if self.name == "adamw":
                torch._fused_adamw_(*state, lr=lr * factor, weight_decay=self.weight_decay / factor, **shared)
            else:
                torch._fused_adam_(*state, lr=lr * factor, weight_decay=self.weight_decay, **shared)
