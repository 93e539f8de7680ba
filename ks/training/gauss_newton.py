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
    split_patterns,
    suffix_grams,
)
from ks.moments.metric import Metric, MetricLike
from ks.training.optimizer import Optimizer
from ks.training.steps import cuda_graph

# The step at lr = 1e-3 is STEP_SIZE over the largest eigenvalue of the second moment of a batch, (1 + √(n/B))² for
# white inputs. 0.16 trained the two steepest weights too, 0.2 diverged on them (benchmarks/README.md).
STEP_SIZE = 0.1
REFERENCE_LR = 1e-3
# Damping, relative to the mean diagonal of each matrix.
DAMPING = 1e-4
# Damping, relative to the mean over all matrices of a split: at small ranks noise takes single ones through zero.
SHARED_DAMPING = 1e-3
# Levenberg–Marquardt damping of the prefixes, times the squared relative loss and less with every step. The left-most
# factor starts from zero, and while the loss is high, noise drives the weak directions of a prefix: without this, steps
# with inverses that are a few steps old diverge, and a warm-up of the rate is needed.
LOSS_DAMPING = 0.5
LOSS_MEMORY = 0.9  # of the running mean of the loss, ten steps
# Steps that all refresh. Those that remove less than SMALL_STEP of an error may have older matrices; with 60 refreshes,
# larger steps diverged in batches of 128.
FIRST_REFRESHES, FIRST_REFRESHES_OF_SMALL_STEPS = 100, 60
SMALL_STEP = 0.03
LONGEST_INTERVAL = 16  # steps between two refreshes
LONGEST_COUPLED_INTERVAL = 64  # the matrices of coupled inputs are expensive, and may be older
# Near-ties of singular values leave slow directions, and so do coupled inputs or outputs. So the step grows to GROWTH
# times STEP_SIZE, but not at once: a large step diverges while the factors still change fast.
GROWTH = 3.0
GROWTH_STEPS = 1000  # until half of it; under white inputs slower before and faster after
# Under white inputs it grows until 10 η, with momentum 0.9 the fraction of an error that a step removes, is SMALL_STEP,
# and the inner factors, whose c inputs are few, grow by the square, until 10 η c / B, their noise, is INNER_NOISE.
INNER_NOISE = 0.4
# Largest noise of a step at first and at last, η · 10 · (n + c) / B with momentum 0.9 and c inputs of a block of the
# left-most factor: 1.2 at first diverged at saturation in batches of 8, 2.0 at last trained all layers of MiniLM tried.
# The largest eigenvalue of a coupled G multiplies it for the left-most factor, whose step G does not divide.
FIRST_NOISE, LAST_NOISE = 0.8, 2.0


class GaussNewton(Optimizer):
    """The Gauss–Newton step with momentum 0.9, decoupled weight decay and without clipping; it has no host read.

    Args:
        parameters: values of shape (a, b, c, d) of a chainable chain, output side first, float32; updated in place.
        metric: G ⊗ C with C the second moment of x; C is I within every column group of the right-most factor, and G
            within every row group of the left-most one.
        batch_size: samples of a batch, B.
        weight_decay: per unit of lr.
        rate_decays: whether the schedule takes lr to zero. Otherwise the noise of larger steps stays, and they grow
            under a metric that couples groups alone.
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
        **settings: bool,
    ):
        super().__init__("sgd", parameters, weight_decay=weight_decay, max_grad_norm=0.0, **settings)
        self.decoupled = True
        patterns = [Pattern(*values.shape) for values in self.parameters]
        rows, cols = patterns[0].rows, patterns[-1].cols
        metric = Metric.of(metric)
        outputs, inputs = metric.outputs.coupling(patterns[0].d), metric.inputs.coupling(patterns[-1].a)
        largest = metric.inputs.largest_of_batch(batch_size, cols)
        # The curvature belongs to half the squared error summed over outputs, the loss is its mean.
        self.rate_factors = [rows / 2 * STEP_SIZE / REFERENCE_LR / largest] * len(patterns)
        # The mean diagonal of PᵀP if outputs of mean square 1 are spread evenly over features of mean square 1.
        self._natural = [rows / pattern.cols for pattern in patterns[:-1]]
        device = self.parameters[0].device
        splits = split_patterns(patterns)
        before = splits if outputs is None else [Pattern(a, b, b, d) for a, b, _, d in patterns[1:]]
        behind = splits if inputs is None else [Pattern(a, c, c, d) for a, _, c, d in patterns[:-1]]
        self._is_coupled = outputs is not None or inputs is not None
        self._outputs, self._inputs = (
            None if matrix is None else matrix.to(device, torch.float32) for matrix in (outputs, inputs)
        )
        self.scaling = self._inverses = SplitMatrices(
            *([_identities(pattern, device) for pattern in side] for side in (before, behind))
        )
        step = STEP_SIZE / largest * 10
        noises = [step * (cols + patterns[0].c) / batch_size] * len(patterns)
        if outputs is not None:
            noises[0] *= torch.linalg.eigvalsh(outputs)[-1].item()
        if self._is_coupled:
            first = [min(noise, FIRST_NOISE) for noise in noises]
            self.rate_factors = [rate * few / noise for rate, few, noise in zip(self.rate_factors, first, noises)]
            noises = first
        self._most_growth = [min(GROWTH, LAST_NOISE / max(noises))] * len(patterns)
        if not self._is_coupled:
            growth = max(1.0, min(*self._most_growth, SMALL_STEP / step)) if rate_decays else 1.0
            inner = [max(1.0, INNER_NOISE * batch_size / pattern.c / step) for pattern in patterns[:-1]]
            self._most_growth = [*(min(growth**2, limit) for limit in inner), growth]
        small = step < SMALL_STEP and not self._is_coupled
        self._first_refreshes = FIRST_REFRESHES_OF_SMALL_STEPS if small else FIRST_REFRESHES
        self.relative_loss = torch.ones((), device=device)
        self.failures = torch.zeros((), dtype=torch.int32, device=device)
        # The settings of a refresh stay on the device, so that a captured one reads new values.
        self._loss_damping, self._grown = torch.zeros((), device=device), torch.zeros((), device=device)
        self._replay: Callable[[], None] | None = None
        self._warnings: list[str] = []
        self._reported = False

    def state(self) -> list[torch.Tensor]:
        return [*super().state(), *self._inverses.left, *self._inverses.right, self.relative_loss, self.failures]

    def prepare(self, step: int) -> None:
        """Invert the matrices again if that is due: before each of the first steps, then ever less often.

        The fraction by which the factors change in a step falls about as 1 / step, so the interval grows with it, in
        powers of two.
        """
        longest = LONGEST_COUPLED_INTERVAL if self._is_coupled else LONGEST_INTERVAL
        interval = min(2 ** ((1 + step // self._first_refreshes).bit_length() - 1), longest)
        if step % interval == 0:
            time = (step / GROWTH_STEPS) ** (1 if self._is_coupled else 2)
            self.refresh(LOSS_DAMPING / (1 + step / 200) ** 2, time / (1 + time))

    def refresh(self, loss_damping: float, grown: float = 0.0) -> None:
        """Compute the inverses from the factors; one that fails keeps its last good value and is counted.

        On a GPU this is about a hundred small kernels, so it is captured as a CUDA graph when it is first due. If the
        capture fails, they are launched one by one, with a warning.

        Args:
            loss_damping: what the squared loss is multiplied by for the damping of the prefixes.
            grown: fraction of the growth of the steps.
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
        damping = self._loss_damping * self.relative_loss.square()
        # Every factor meets its growth once: the right-most one from its left, the others from their right.
        *inner, last = ((most - 1) * self._grown + 1 for most in self._most_growth)
        values, outputs, inputs = self.parameters, self._outputs, self._inputs
        grams = prefix_grams(values) if outputs is None else coupled_grams(values, outputs)
        growths = [None] * (len(grams) - 1) + [last]
        for place, gram, natural, growth in zip(self._inverses.left, grams, self._natural, growths, strict=True):
            self._invert(gram, damping * natural, place, growth)
        grams = suffix_grams(values) if inputs is None else coupled_moments(values, inputs)
        for place, gram, growth in zip(self._inverses.right, grams, inner, strict=True):
            self._invert(gram, 0.0, place, growth)

    def _invert(
        self, gram: torch.Tensor, damping: torch.Tensor | float, place: torch.Tensor, growth: torch.Tensor | None
    ) -> None:
        """Write `growth` times the inverses of damped matrices, shape (a, c, c, d), into `place`; failures stay."""
        matrices = gram.permute(0, 3, 1, 2)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        diagonal += DAMPING * diagonal.mean(-1, keepdim=True) + SHARED_DAMPING * diagonal.mean() + damping
        root, info = torch.linalg.cholesky_ex(matrices)
        inverse = torch.cholesky_inverse(torch.where((info == 0)[..., None, None], root, 1.0))
        # No entry of a positive definite matrix is larger than its diagonal.
        good = (info == 0) & inverse.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        kept = place.permute(0, 3, 1, 2)
        torch.where(good[..., None, None], inverse if growth is None else inverse.mul_(growth), kept, out=kept)
        self.failures += (~good).sum()

    def update(self, lr: float | torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        self.relative_loss.lerp_(loss.clamp(max=1.0), 1 - LOSS_MEMORY)
        return super().update(lr, loss)

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
