"""The Gauss–Newton step of a chain: the gradient of every factor, divided by its curvature from both sides.

Factor l has the prefix P = K_1 ⋯ K_{l-1} to its left, and z = K_{l+1} ⋯ K_L x enters it. The curvature of half the
squared error in a block of its values is (PᵀP) ⊗ E[z zᵀ], so the step is V = (PᵀP + λI)⁻¹ U (E[z zᵀ] + λI)⁻¹ with the
gradient U; both matrices are those of a split of the chain (`ks.chain.split_grams`). Inputs whose second moment C
couples the column groups of the right-most factor couple all features that enter a block: there E[z zᵀ] is a c × c
matrix instead of r × r ones. Likewise, where G couples the row groups of the left-most factor, Pᵀ G P takes the place
of PᵀP, one b × b matrix for each block.

Source: Tong, Ma, Chi, "Accelerating ill-conditioned low-rank matrix estimation via scaled gradient descent" (2021), for
two factors; Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015).
"""

from collections.abc import Callable

import torch

from ks.chain.bmm import empty_values
from ks.chain.patterns import Pattern
from ks.chain.split_grams import (
    SplitMatrices,
    coupled_grams,
    coupled_moments,
    prefix_grams,
    scale_gradient,
    split_patterns,
    suffix_grams,
)
from ks.moments.metric import Metric, MetricLike
from ks.training.optimizer import Optimizer
from ks.training.step_sizes import GROWTH_STEPS, REFERENCE_LR, coupled_step_sizes, step_sizes
from ks.training.steps import cuda_graph

# Damping, relative to the mean diagonal of all matrices of a split: noise takes single ones through zero.
DAMPING = 1e-3
# Eigenvalues of a matrix, relative to its largest, that count as zero in epochs of least squares.
SMALLEST_EIGENVALUE = 1e-6
# Steps between two refreshes: half as many after the matrices have changed by more than MUCH, and twice as many after
# less than LITTLE, as `_invert` measures it. A step diverges where a matrix has more than doubled.
LONGEST_INTERVAL = 64
LITTLE, MUCH = 0.35, 0.7
# The last half of the epochs are of least squares. They remove all noise, so that the steps before may be large. With a
# third of them, ends are as close to the floors, but later.
LEAST_SQUARES_PART = 0.5


class GaussNewton(Optimizer):
    """Gauss–Newton steps on batches, then epochs of alternating least squares; nothing is clipped.

    A step changes all factors. It adds the scaled gradients to their values as they are made, without a buffer in
    between, unless their norm or, in float16, their overflow must be known before.

    An epoch of least squares changes one factor, from the right-most to the left-most and again, the right-most one in
    the last epoch: it adds up the gradients of all batches, and takes the whole step V of their mean at the end. On
    whitened samples of white inputs, this is the solution of the least-squares problem in this factor, without noise.

    Args:
        parameters: values of shape (a, b, c, d) of a chainable chain, output side first, float32; updated in place.
        metric: G ⊗ C with C the second moment of x; C is I within every column group of the right-most factor, and G
            within every row group of the left-most one.
        batch_size: samples of a batch, B.
        weight_decay: decoupled, per unit of lr.
        rate_decays: whether the schedule takes lr to zero. Otherwise the noise of larger steps stays, and they grow
            under a metric that couples groups alone.
        whitened_run: steps of an epoch and epochs of a run on whitened samples; (1, 0) for no least squares.
        settings: `loss_scaling` and `measure_norm` as in `Optimizer`.
    """

    def __init__(
        self,
        parameters: list[torch.Tensor],
        metric: MetricLike,
        batch_size: int,
        *,
        weight_decay: float = 0.0,
        rate_decays: bool = True,
        whitened_run: tuple[int, int] = (1, 0),
        **settings: bool,
    ):
        super().__init__("sgd", parameters, weight_decay=weight_decay, max_grad_norm=0.0, **settings)
        self.moments = []  # without momentum, which the noise of batches makes useless
        self._is_buffered = self.measure_norm or self.loss_scale is not None
        self.accumulates = not self._is_buffered
        patterns = [Pattern(*values.shape) for values in self.parameters]
        metric = Metric.of(metric)
        outputs, inputs = metric.outputs.coupling(patterns[0].d), metric.inputs.coupling(patterns[-1].a)
        # The curvature belongs to half the squared error summed over outputs, the loss is its mean.
        self._whole_step = patterns[0].rows / 2
        device = self.parameters[0].device
        splits = split_patterns(patterns)
        before = splits if outputs is None else [Pattern(a, b, b, d) for a, b, _, d in patterns[1:]]
        behind = splits if inputs is None else [Pattern(a, c, c, d) for a, _, c, d in patterns[:-1]]
        self._outputs, self._inputs = (
            None if matrix is None else matrix.to(device, torch.float32) for matrix in (outputs, inputs)
        )
        self._inverses = SplitMatrices(
            *([_identities(pattern, device) for pattern in side] for side in (before, behind))
        )
        self._is_coupled = outputs is not None or inputs is not None
        self._first_step = 1 / metric.inputs.largest_of_batch(batch_size, patterns[-1].cols)
        if self._is_coupled:
            first, last = coupled_step_sizes(patterns, self._first_step, batch_size, outputs)
        else:
            first, last = step_sizes(patterns, self._first_step, batch_size, rate_decays)
        # What the step of every factor is multiplied by, at first and at last.
        self._first_sizes, self._last_sizes = torch.tensor(first, device=device), torch.tensor(last, device=device)
        self._sizes = torch.ones(len(patterns), device=device)  # those in the inverses
        self._steps_per_epoch, self._num_epochs = whitened_run
        last_epochs = 0 if self._is_coupled else int(LEAST_SQUARES_PART * self._num_epochs)
        self._least_squares_epochs = last_epochs if last_epochs >= len(patterns) else 0
        self._sums = [torch.empty_like(values) for values in self.parameters] if self._is_buffered else self.gradients
        self.failures = torch.zeros((), dtype=torch.int32, device=device)
        self._pace = torch.tensor([1, 0])  # steps between two refreshes; the step before which one is due
        # What a refresh reads and writes stays on the device, so that a captured one reads new values.
        self._grown, self._change = torch.zeros((), device=device), torch.zeros((), device=device)
        self._replay: Callable[[], None] | None = None
        self._warnings: list[str] = []
        self._reported = False
        self._begin_steps()

    def state(self) -> list[torch.Tensor]:
        changed = self._sums if self.phase else ()
        refresh = (*self._inverses.left, *self._inverses.right, self._sizes, self._pace, self.failures)
        return [*super().state(), *refresh, *changed]

    def prepare(self, step: int) -> None:
        """Begin an epoch of least squares, or refresh the inverses if that is due, which reads the device once.

        The less the matrices change, the less often it is due.
        """
        epoch, in_epoch = divmod(step, self._steps_per_epoch)
        if 0 < (left := self._num_epochs - epoch) <= self._least_squares_epochs:
            if in_epoch == 0:
                self._begin_least_squares(-left % len(self.parameters))
            return
        interval, due = self._pace.tolist()
        if step < due:
            return
        time = (step / GROWTH_STEPS) ** (1 if self._is_coupled else 2)
        self.refresh(time / (1 + time))
        change = self._change.item()
        if not change < MUCH:
            interval = max(1, interval // 2)
        elif change < LITTLE:
            interval = min(2 * interval, LONGEST_INTERVAL)
        self._pace.copy_(torch.tensor([interval, step + interval]))

    def end_epoch(self) -> None:
        if not self.phase:
            return
        index, values = self.phase - 1, [factor.double() for factor in self.parameters]
        grams = SplitMatrices(prefix_grams(values), suffix_grams(values)).beside(index)
        inverses = (None if gram is None else _pseudo_inverse(gram) for gram in grams)
        self.parameters[index].add_(scale_gradient(self._sums[index].double(), *inverses))
        self._begin_steps()

    def _begin_steps(self) -> None:
        self.phase, self.scaling = 0, self._inverses
        self.places = [*(self.gradients if self._is_buffered else self.parameters)]

    def _begin_least_squares(self, index: int) -> None:
        """Begin an epoch that changes the factor `index` alone."""
        self.phase, self.scaling = index + 1, None
        self._sums[index].zero_()
        self.gradient.zero_()
        self.places = [None] * len(self.parameters)
        self.places[index] = self.gradients[index]

    def refresh(self, grown: float = 0.0) -> None:
        """Compute the inverses from the factors; one that fails keeps its last good value and is counted.

        On a GPU this is about a hundred small kernels, so it is captured as a CUDA graph when it is first due. If the
        capture fails, they are launched one by one, with a warning.

        Args:
            grown: fraction of the way from the first size of the steps to the last.
        """
        self._grown.fill_(grown)
        if self._replay is None:
            self._replay = self._captured() if self.failures.is_cuda else self._compute_inverses
        self._replay()

    def _captured(self) -> Callable[[], None]:
        changed = (*self._inverses.left, *self._inverses.right, self._sizes, self.failures)
        before = [tensor.clone() for tensor in changed]
        try:
            return cuda_graph(self._compute_inverses)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warnings.append(f"the curvature is measured without a CUDA graph, which is slower ({reason})")
            return self._compute_inverses
        finally:
            torch._foreach_copy_(changed, before)

    @torch.no_grad()
    def _compute_inverses(self) -> None:
        before, self._change[...] = self._sizes.clone(), 0
        torch.lerp(self._first_sizes, self._last_sizes, self._grown, out=self._sizes)
        values, outputs, inputs = self.parameters, self._outputs, self._inputs
        # Every factor meets its size once: the right-most one from its left, the others from their right.
        grams = prefix_grams(values) if outputs is None else coupled_grams(values, outputs)
        for index, (place, gram) in enumerate(zip(self._inverses.left, grams, strict=True), 1):
            sizes = (before[index], self._sizes[index]) if index == len(grams) else (1.0, 1.0)
            self._invert(gram, place, *sizes)
        grams = suffix_grams(values) if inputs is None else coupled_moments(values, inputs)
        for index, (place, gram) in enumerate(zip(self._inverses.right, grams, strict=True)):
            self._invert(gram, place, before[index], self._sizes[index])

    def _invert(
        self,
        gram: torch.Tensor,
        place: torch.Tensor,
        before: torch.Tensor | float,
        size: torch.Tensor | float,
    ) -> None:
        """Write `size` times the inverses of damped matrices, shape (a, c, c, d), into `place`; failures stay.

        Args:
            before: what the inverses in `place` are multiplied by.
        """
        matrices = gram.permute(0, 3, 1, 2)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean()
        diagonal += DAMPING * mean + (mean == 0)  # the left-most factor starts from zero
        kept = place.permute(0, 3, 1, 2)
        changed = (kept / before) @ matrices
        changed.diagonal(dim1=-2, dim2=-1).sub_(1)
        squared = changed @ changed
        torch.maximum(self._change, (squared * squared.mT).sum((-2, -1)).max() ** 0.25, out=self._change)
        root, info = torch.linalg.cholesky_ex(matrices)
        inverse = torch.cholesky_inverse(torch.where((info == 0)[..., None, None], root, 1.0))
        # No entry of a positive definite matrix is larger than its diagonal.
        good = (info == 0) & inverse.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        torch.where(good[..., None, None], inverse.mul_(size), kept, out=kept)
        self.failures += (~good).sum()

    def scale(self, lr: float | torch.Tensor) -> float | torch.Tensor:
        return super().scale(lr) if self._is_buffered else -self._rate(lr)

    def _rate(self, lr: float | torch.Tensor) -> float | torch.Tensor:
        """Return the factor of a scaled gradient in a step."""
        part = 1 / self._steps_per_epoch if self.phase else lr * (self._first_step / REFERENCE_LR)
        return self._whole_step * part

    def update(self, lr: float | torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        found_inf = None if self.loss_scale is None else self.loss_scale.unscale(self.gradient)
        if self._is_buffered:
            changed = [self.phase - 1] if self.phase else range(len(self.parameters))
            values = self._sums if self.phase else self.parameters
            torch._fused_sgd_(
                [values[index] for index in changed],
                [self.gradients[index] for index in changed],
                [],
                lr=self._rate(lr),
                weight_decay=0.0,
                maximize=False,
                found_inf=found_inf,
                **self._settings | {"momentum": 0.0},
            )
        if self.weight_decay:
            taken = 1.0 if found_inf is None else 1.0 - found_inf
            for values in self.parameters:
                values.mul_(1.0 - lr * self.weight_decay * taken)
        return torch.linalg.vector_norm(self.gradient) if self.measure_norm else self._no_norm

    def trouble(self) -> str | None:
        """Return a warning, once, if the capture or an inverse failed; this reads the device."""
        if self._warnings:
            return self._warnings.pop()
        if self._reported or not self.failures.item():
            return None
        self._reported = True
        return (
            f"{self.failures.item()} curvature matrices were not positive definite in float32; the step went on with "
            "the last good ones"
        )


def _identities(pattern: Pattern, device: torch.device) -> torch.Tensor:
    values = empty_values(pattern, device)
    return values.copy_(torch.eye(pattern.b, device=device)[None, :, :, None].expand(pattern))


def _pseudo_inverse(gram: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-inverses of matrices of shape (a, c, c, d)."""
    return torch.linalg.pinv(gram.permute(0, 3, 1, 2), rtol=SMALLEST_EIGENVALUE, hermitian=True).permute(0, 2, 3, 1)
