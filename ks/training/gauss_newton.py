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
from ks.training.steps import cuda_graph

# At this rate, a step removes 1 / (largest eigenvalue of the second moment of a batch) of an error at first, or
# LARGEST_STEP if that is less; white inputs have (1 + √(n/B))² there. In batches of 512 with 768 inputs, a step of 0.2
# diverged and 0.13 did not.
REFERENCE_LR = 1e-3
LARGEST_STEP = 0.125
# Damping, relative to the mean diagonal of each matrix.
DAMPING = 1e-4
# Damping, relative to the mean over all matrices of a split: at small ranks noise takes single ones through zero.
SHARED_DAMPING = 1e-3
# Eigenvalues of a matrix, relative to its largest, that count as zero in epochs of least squares.
SMALLEST_EIGENVALUE = 1e-6
# Levenberg–Marquardt damping of the prefixes, times the squared relative loss and less with every step. The left-most
# factor starts from zero, and while the loss is high, noise drives the weak directions of a prefix: without this, steps
# with inverses that are a few steps old diverge, and a warm-up of the rate is needed.
LOSS_DAMPING = 0.5
LOSS_MEMORY = 0.9  # of the running mean of the loss, ten steps
# Steps that all refresh. Those that remove less than SMALL_STEP of an error may have older matrices; with 60 refreshes,
# larger steps diverged in batches of 128.
FIRST_REFRESHES, FIRST_REFRESHES_OF_SMALL_STEPS = 100, 30
SMALL_STEP = 0.03
LONGEST_INTERVAL = 64  # steps between two refreshes
# Near-ties of singular values leave slow directions, and so do coupled inputs or outputs. So the step grows to GROWTH
# times what it is at first, but not at once: a large step diverges while the factors still change fast.
GROWTH = 3.0
GROWTH_STEPS = 1000  # until half of it; under white inputs slower before and faster after
# Under white inputs it grows until it removes SMALL_STEP of an error, h, and the inner factors, whose c inputs are few,
# grow by the square, until their noise h c / B is INNER_NOISE.
INNER_NOISE = 0.4
# Largest noise of a step at first and at last, h (n + c) / B with c inputs of a block of the left-most factor: 1.2 at
# first diverged at saturation in batches of 8, 2.0 at last trained all layers of MiniLM tried. The largest eigenvalue
# of a coupled G multiplies it for the left-most factor, whose step G does not divide.
FIRST_NOISE, LAST_NOISE = 0.8, 2.0
# The last 1 / LEAST_SQUARES_PART of the epochs are of least squares. They remove all noise, so that the steps before
# may be large; more of them came no closer, because steps turn near-tied directions faster.
LEAST_SQUARES_PART = 3


class GaussNewton(Optimizer):
    """Gauss–Newton steps on batches, then epochs of alternating least squares; it clips nothing and has no host read.

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
        rows, cols = patterns[0].rows, patterns[-1].cols
        metric = Metric.of(metric)
        outputs, inputs = metric.outputs.coupling(patterns[0].d), metric.inputs.coupling(patterns[-1].a)
        first_step = min(1 / metric.inputs.largest_of_batch(batch_size, cols), LARGEST_STEP)
        # The curvature belongs to half the squared error summed over outputs, the loss is its mean.
        self._whole_step, self._first_step = rows / 2, first_step
        # The mean diagonal of PᵀP if outputs of mean square 1 are spread evenly over features of mean square 1.
        self._natural = [rows / pattern.cols for pattern in patterns[:-1]]
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
        noises = [first_step * (cols + patterns[0].c) / batch_size] * len(patterns)
        if outputs is not None:
            noises[0] *= torch.linalg.eigvalsh(outputs)[-1].item()
        # What the step of every factor is multiplied by, at first and at last.
        self._sizes = [min(1.0, FIRST_NOISE / noise) if self._is_coupled else 1.0 for noise in noises]
        growth = min(GROWTH, LAST_NOISE / max(size * noise for size, noise in zip(self._sizes, noises)))
        self._last_sizes = [size * growth for size in self._sizes]
        if not self._is_coupled:
            growth = max(1.0, min(growth, SMALL_STEP / first_step)) if rate_decays else 1.0
            inner = [max(1.0, INNER_NOISE * batch_size / pattern.c / first_step) for pattern in patterns[:-1]]
            self._last_sizes = [*(min(growth**2, limit) for limit in inner), growth]
        small = first_step < SMALL_STEP and not self._is_coupled
        self._first_refreshes = FIRST_REFRESHES_OF_SMALL_STEPS if small else FIRST_REFRESHES
        self._steps_per_epoch, self._num_epochs = whitened_run
        last_epochs = 0 if self._is_coupled else self._num_epochs // LEAST_SQUARES_PART
        self._least_squares_epochs = last_epochs if last_epochs >= len(patterns) else 0
        self._sums = [torch.empty_like(values) for values in self.parameters] if self._least_squares_epochs else []
        self.relative_loss = torch.ones((), device=device)
        self.failures = torch.zeros((), dtype=torch.int32, device=device)
        # The settings of a refresh stay on the device, so that a captured one reads new values.
        self._loss_damping, self._grown = torch.zeros((), device=device), torch.zeros((), device=device)
        self._replay: Callable[[], None] | None = None
        self._warnings: list[str] = []
        self._reported = False
        self._begin_steps()

    def state(self) -> list[torch.Tensor]:
        changed = self._sums if self.phase else ()
        return [
            *super().state(),
            *self._inverses.left,
            *self._inverses.right,
            self.relative_loss,
            self.failures,
            *changed,
        ]

    def prepare(self, step: int) -> None:
        """Invert the matrices again if that is due: before each of the first steps, then ever less often.

        The fraction by which the factors change in a step falls about as 1 / step, so the interval grows with it, in
        powers of two.
        """
        epoch, in_epoch = divmod(step, self._steps_per_epoch)
        if 0 < (left := self._num_epochs - epoch) <= self._least_squares_epochs:
            if in_epoch == 0:
                self._begin_least_squares(-left % len(self.parameters))
            return
        interval = min(2 ** ((1 + step // self._first_refreshes).bit_length() - 1), LONGEST_INTERVAL)
        if step % interval == 0:
            time = (step / GROWTH_STEPS) ** (1 if self._is_coupled else 2)
            self.refresh(LOSS_DAMPING / (1 + step / 200) ** 2, time / (1 + time))

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
        self.places[index] = (self.gradients if self._is_buffered else self._sums)[index]

    def refresh(self, loss_damping: float, grown: float = 0.0) -> None:
        """Compute the inverses from the factors; one that fails keeps its last good value and is counted.

        On a GPU this is about a hundred small kernels, so it is captured as a CUDA graph when it is first due. If the
        capture fails, they are launched one by one, with a warning.

        Args:
            loss_damping: what the squared loss is multiplied by for the damping of the prefixes.
            grown: fraction of the way from the first size of the steps to the last.
        """
        self._loss_damping.fill_(loss_damping)
        self._grown.fill_(grown)
        if self._replay is None:
            self._replay = self._captured() if self.failures.is_cuda else self._compute_inverses
        self._replay()

    def _captured(self) -> Callable[[], None]:
        failures = self.failures.clone()
        try:
            return cuda_graph(self._compute_inverses)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warnings.append(f"the curvature is measured without a CUDA graph, which is slower ({reason})")
            return self._compute_inverses
        finally:
            self.failures.copy_(failures)

    @torch.no_grad()
    def _compute_inverses(self) -> None:
        damping = self._loss_damping * self.relative_loss.clamp(max=1.0).square()
        # Every factor meets its size once: the right-most one from its left, the others from their right.
        *inner, last = ((at_last - size) * self._grown + size for size, at_last in zip(self._sizes, self._last_sizes))
        values, outputs, inputs = self.parameters, self._outputs, self._inputs
        grams = prefix_grams(values) if outputs is None else coupled_grams(values, outputs)
        sizes = [None] * (len(grams) - 1) + [last]
        for place, gram, natural, size in zip(self._inverses.left, grams, self._natural, sizes, strict=True):
            self._invert(gram, damping * natural, place, size)
        grams = suffix_grams(values) if inputs is None else coupled_moments(values, inputs)
        for place, gram, size in zip(self._inverses.right, grams, inner, strict=True):
            self._invert(gram, 0.0, place, size)

    def _invert(
        self, gram: torch.Tensor, damping: torch.Tensor | float, place: torch.Tensor, size: torch.Tensor | None
    ) -> None:
        """Write `size` times the inverses of damped matrices, shape (a, c, c, d), into `place`; failures stay."""
        matrices = gram.permute(0, 3, 1, 2)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        diagonal += DAMPING * diagonal.mean(-1, keepdim=True) + SHARED_DAMPING * diagonal.mean() + damping
        root, info = torch.linalg.cholesky_ex(matrices)
        inverse = torch.cholesky_inverse(torch.where((info == 0)[..., None, None], root, 1.0))
        # No entry of a positive definite matrix is larger than its diagonal.
        good = (info == 0) & inverse.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        kept = place.permute(0, 3, 1, 2)
        torch.where(good[..., None, None], inverse if size is None else inverse.mul_(size), kept, out=kept)
        self.failures += (~good).sum()

    def scale(self, lr: float | torch.Tensor) -> float | torch.Tensor:
        return super().scale(lr) if self._is_buffered else -self._rate(lr)

    def _rate(self, lr: float | torch.Tensor) -> float | torch.Tensor:
        """Return the factor of a scaled gradient in a step."""
        part = 1 / self._steps_per_epoch if self.phase else lr * (self._first_step / REFERENCE_LR)
        return self._whole_step * part

    def update(self, lr: float | torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        self.relative_loss.lerp_(loss, 1 - LOSS_MEMORY)
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
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=found_inf,
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
