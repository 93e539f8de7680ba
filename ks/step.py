"""Samples (whitened, fresh or fixed), one optimiser step, and epochs of steps, eager or captured as a CUDA graph.

Nothing here reads the device back to the host.

The optimisers are the fused kernels under `torch.optim`: building a `torch.optim.Optimizer` imports dynamo, which
would double the start-up of every training subprocess.
"""

import itertools
import math
from collections.abc import Callable

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
            "left in whole batches after --val_split; raise --num_samples or use --sampling fresh"
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
        tensor of the same shape and dtype. Where N is below 2n, XᵀX is too ill-conditioned for float32 and the work is
        done in float64; elsewhere float32 leaves less than 1e-6 in any entry of XᵀX / N.
    """
    count, features = samples.shape
    wide = samples.to(torch.float32 if count >= 2 * features else torch.float64)
    root = torch.linalg.cholesky(wide.t() @ wide / count)
    return torch.linalg.solve_triangular(root.t(), wide, upper=True, left=False).to(samples.dtype).contiguous()


class Samples:
    """Unit Gaussian inputs x ~ N(0, I) and their targets W x in batches, the same for every rank of a study.

    A batch keeps its samples and epochs shuffle the batches, so that a step reads them where they lie; shuffling single
    samples comes no closer to the floor (benchmarks/README.md).

    Args:
        weight: W, shape (m, n), float32, on the device to train on.
        num_train: number of training samples; what does not fill a batch is left out.
        num_validation: number of validation samples.
        batch_size: of the training batches.
        sampling: 'whitened' (one set, second moment exactly I), 'fresh' (a new set every epoch) or 'fixed'.
        seed: of inputs and shuffles.
        output_rows: the order of the targets in a batch of a given size, as rows of W; the natural one unless told.
        batch_last: batches of shape (n, batch) instead of (batch, n).
        dtype: of the inputs; targets stay float32.

    `inputs` and `targets` hold the training batches, shape (steps, batch, n or m); with `fresh` an epoch overwrites
    them. `validation` holds batches of other samples, `validation_shares` weighs their mean losses to the mean of all.
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
        output_rows: Callable[[int], torch.Tensor] | None = None,
        batch_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.weight, self.batch_size, self.output_rows = weight, batch_size, output_rows
        self.sampling, self.seed, self.batch_last, self.dtype = sampling, seed, batch_last, dtype
        self.steps_per_epoch = num_train // batch_size
        drawn = self._draw(num_validation, "validation")
        self.validation = [batch for part in drawn.split(1024) for batch in zip(*self._with_targets(part, len(part)))]
        shares = torch.tensor([targets.numel() for _, targets in self.validation], device=weight.device)
        self.validation_shares = shares / shares.sum()
        drawn = self._draw(self.steps_per_epoch * batch_size, "train", epoch=1 if sampling == "fresh" else 0)
        if sampling == "whitened":
            drawn = whiten(drawn)
        self.inputs, self.targets = self._with_targets(drawn, batch_size)

    def _draw(self, count: int, stream: str, epoch: int = 0) -> torch.Tensor:
        device = self.weight.device
        generator = seeded_generator(self.seed, stream, epoch, device)
        return torch.randn(count, self.weight.shape[1], generator=generator, device=device)

    def _with_targets(self, inputs, batch_size):
        """Inputs and targets in batches, contiguous in the layout to train in."""
        weight = self.weight if self.output_rows is None else self.weight[self.output_rows(batch_size)]
        both = (inputs.to(self.dtype), inputs @ weight.t())
        both = (samples.unflatten(0, (-1, batch_size)) for samples in both)
        return tuple(samples.transpose(1, 2).contiguous() if self.batch_last else samples for samples in both)

    def start_epoch(self, number: int) -> torch.Tensor:
        """Draw what epoch `number` (from 1) needs anew and return the order of its batches, int64 on the CPU."""
        if self.sampling == "fresh":
            if number > 1:
                drawn = self._draw(self.steps_per_epoch * self.batch_size, "train", number)
                for samples, new in zip((self.inputs, self.targets), self._with_targets(drawn, self.batch_size)):
                    samples.copy_(new)
            return torch.arange(self.steps_per_epoch)
        return torch.randperm(self.steps_per_epoch, generator=seeded_generator(self.seed, "shuffle", number))


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

    def state(self) -> tuple:
        """All that changes, for a checkpoint."""
        return self.best, self.bad_epochs, self.reduction

    def restore(self, state: tuple) -> None:
        self.best, self.bad_epochs, self.reduction = state

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

    def unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        """Divide a gradient by the scale in place; returns 1.0 if something in it was not finite, else 0.0."""
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found_inf, self.scale.reciprocal())
        torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, 500)
        return self.found_inf


def squared_error_and_gradient(prediction: torch.Tensor, target: torch.Tensor, scale=1.0):
    """Mean squared error and `scale` times its gradient for the prediction, written out: autograd costs more.

    Args:
        prediction: any float dtype, which is the gradient's too.
        target: same shape, float32.
        scale: of the gradient; a number or a scalar tensor.
    """
    difference = prediction - target
    loss = torch.linalg.vector_norm(difference).square() / difference.numel()
    return loss, difference.mul_(2.0 / difference.numel() * scale).to(prediction.dtype)


def loss_and_gradient(criterion, prediction: torch.Tensor, target: torch.Tensor, scale=1.0):
    """criterion(prediction, target) in float32, and `scale` times its gradient for the prediction, by autograd."""
    prediction.requires_grad_()
    loss = criterion(prediction.float(), target)
    return loss.detach(), torch.autograd.grad(loss * scale, prediction)[0]


class Optimiser:
    """AdamW, Adam or SGD with momentum: fused, clipped, loss-scaled for float16, without a host read.

    Adam's rate is relative to the natural size of each factor's values (`RELATIVE_STEP`), SGD's is the plain one.

    Args:
        name: 'adamw', 'adam' or 'sgd'.
        parameters: values of shape (a, b, c, d), float32, each without gaps in memory; updated in place.
        weight_decay: AdamW's decay per unit of lr; for the others the factor of the L2 term.
        max_grad_norm: the global gradient norm is clipped to this; 0 switches it off.
        loss_scaling: for float16.

    `gradients` is where a step writes the gradients before `update`, laid out as the parameters.
    """

    def __init__(self, name, parameters, *, weight_decay=0.0, max_grad_norm=1.0, loss_scaling=False):
        self.name, self.parameters = name, list(parameters)
        self.max_grad_norm = max_grad_norm
        device = self.parameters[0].device
        self.loss_scale = LossScale(device) if loss_scaling else None
        # One buffer, so that norm and scaling are one operation.
        self._gradient = torch.zeros(sum(values.numel() for values in self.parameters), device=device)
        parts = self._gradient.split([values.numel() for values in self.parameters])
        self.gradients = [part.as_strided(v.shape, v.stride()) for part, v in zip(parts, self.parameters)]
        self.count = torch.zeros((), device=device)
        if name == "sgd":
            self.rate_factors = [1.0] * len(self.parameters)
            self.moments = [[torch.zeros_like(values)] for values in self.parameters]
            self._fused = torch._fused_sgd_
            self._settings = {"momentum": SGD_MOMENTUM, "dampening": 0.0, "nesterov": False, "is_first_step": False}
        else:
            self.rate_factors = [RELATIVE_STEP * values.shape[2] ** -0.5 for values in self.parameters]
            self.moments = [[torch.zeros_like(values), torch.zeros_like(values)] for values in self.parameters]
            self._fused = torch._fused_adamw_ if name == "adamw" else torch._fused_adam_
            self._settings = {"beta1": ADAM_BETAS[0], "beta2": ADAM_BETAS[1], "eps": ADAM_EPSILON, "amsgrad": False}
        # Decoupled decay is per unit of the plain rate.
        self._decays = [weight_decay / factor if name == "adamw" else weight_decay for factor in self.rate_factors]

    @property
    def scale(self):
        """What a step multiplies the gradient of its loss by."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def state(self) -> list[torch.Tensor]:
        """Every tensor that a step changes and the next one reads."""
        scaling = vars(self.loss_scale).values() if self.loss_scale else ()
        return [*self.parameters, *itertools.chain(*self.moments), self.count, *scaling]

    def update(self, lr: float | torch.Tensor) -> torch.Tensor:
        """Update the parameters from what `gradients` holds.

        Args:
            lr: learning rate of this step; as a scalar tensor on the device, it can change under a captured graph.
        Returns:
            the gradient norm before clipping, a scalar on the device.
        """
        found_inf = None if self.loss_scale is None else self.loss_scale.unscale(self._gradient)
        norm = torch.linalg.vector_norm(self._gradient)
        divisor = None
        if self.max_grad_norm:
            # The fused kernels divide the gradients by this on their way; a CPU can look, and spare itself a second
            # pass over memory where nothing is clipped.
            divisor = (norm / self.max_grad_norm).clamp_(min=1.0)
            if divisor.device.type == "cpu" and divisor == 1:
                divisor = None
        self.count += 1.0 if found_inf is None else 1.0 - found_inf
        for values, gradient, moments, factor, decay in zip(
            self.parameters, self.gradients, self.moments, self.rate_factors, self._decays
        ):
            state = [[values], [gradient], *([moment] for moment in moments)]
            if self.name != "sgd":
                state += [[], [self.count]]
            self._fused(
                *state,
                lr=lr * factor,
                weight_decay=decay,
                maximize=False,
                grad_scale=divisor,
                found_inf=found_inf,
                **self._settings,
            )
        return norm


class Epochs:
    """The steps of an epoch, one after another.

    Args:
        step: (inputs, targets, lr) → (loss, gradient norm), scalars on the device.
        samples: the batches.
    """

    def __init__(self, step, samples: Samples):
        self.step, self.samples = step, samples

    def run(self, number: int, rates: list[float]) -> torch.Tensor:
        """Take the steps of epoch `number` (from 1) at these learning rates.

        Returns:
            losses and gradient norms before clipping, shape (2, steps), on the device.
        """
        order = self.samples.start_epoch(number).tolist()
        inputs, targets = self.samples.inputs, self.samples.targets
        results = [self.step(inputs[batch], targets[batch], rate) for batch, rate in zip(order, rates)]
        return torch.stack([torch.stack(column) for column in zip(*results)])


class CapturedEpochs(Epochs):
    """`Epochs` with the step captured once as a CUDA graph and replayed: no launch by launch, no host read.

    Everything that differs from step to step lies on the device: the position in the epoch, the order of the batches,
    the learning rates and the results.

    Args:
        step, samples: as in `Epochs`; lr comes as a scalar tensor.
        state: every tensor that a step changes; put back after the warm-up that capturing needs.
        capture: turns a function without arguments into one that replays it.
    Raises:
        RuntimeError: a step that cannot be captured, for instance one that reads the device.
    """

    def __init__(self, step, samples: Samples, state: list[torch.Tensor], capture=None):
        super().__init__(step, samples)
        device, steps = samples.inputs.device, samples.steps_per_epoch
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._order = torch.zeros(steps, dtype=torch.int64, device=device)
        self._rates = torch.zeros(steps, device=device)
        self._results = torch.zeros(2, steps, device=device)
        before = [tensor.detach().clone() for tensor in state]
        try:
            self._replay = (capture or _cuda_graph)(self._take_step)
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before):
                    tensor.copy_(value)

    def _take_step(self):
        batch = self._order.index_select(0, self._position)
        inputs, targets = (both.index_select(0, batch)[0] for both in (self.samples.inputs, self.samples.targets))
        loss, norm = self.step(inputs, targets, self._rates.index_select(0, self._position)[0])
        self._results.index_copy_(1, self._position, torch.stack([loss, norm]).unsqueeze(1))
        self._position.add_(1).remainder_(len(self._order))

    def run(self, number: int, rates: list[float]) -> torch.Tensor:
        self._order.copy_(self.samples.start_epoch(number))
        self._rates.copy_(torch.tensor(rates))
        self._position.zero_()
        for _ in rates:
            self._replay()
        return self._results.clone()


def _cuda_graph(function):
    """Capture `function` as a CUDA graph, after three runs on a side stream that settle libraries and allocations."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make_epochs(step, samples: Samples, state: list[torch.Tensor], captured: bool) -> tuple[Epochs, str]:
    """`CapturedEpochs` if asked for and possible, else `Epochs`.

    Returns:
        (the epochs, how they run: one line for the user).
    """
    if not captured:
        return Epochs(step, samples), "one by one"
    try:
        return CapturedEpochs(step, samples, state), "captured as a CUDA graph"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Epochs(step, samples), f"one by one (WARNING: CUDA graph capture failed, this is slower: {reason})"
