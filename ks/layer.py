"""KSLinear: a Kronecker-sparse chain as an nn.Module with the interface of nn.Linear."""

import math
from collections.abc import Sequence

import torch

from ks.bounds.factorize import factorize
from ks.chain.backend import choose_impl
from ks.chain.dense import dense_chain
from ks.chain.patterns import Pattern, check_patterns, make_chain
from ks.chain.product import blocks_of, chain_layout, empty_blocks, multiply, values_of
from ks.errors import UsageError
from ks.files.memory import check_fits
from ks.files.torch_files import plain, read_torch_file
from ks.moments.metric import MetricLike

FILE_FORMAT = "ks_chain"
FILE_VERSION = 1


class KSLinear(torch.nn.Module):
    """y = x Wᵀ (+ bias) with W = K_1 … K_L, each K_l Kronecker-sparse; a drop-in for nn.Linear.

    The values of factor l are the parameter `block_l`, l from 0, of shape (a·d, c, b), as they multiply; `factors`
    shows them in the shape (a, b, c, d). Precision and autocast are those of nn.Linear: torch's global settings decide.

    Args:
        in_features: n.
        out_features: m.
        rank: r of the chain; see `ks.chain.patterns.Chain`. As a third positional argument it stands where nn.Linear
            has its bias.
        bias: whether to add a trained bias of shape (m,). The default is none, unlike that of nn.Linear.
        chain: 'monarch', 'lowrank', 'butterfly' or 'lowrank_butterfly'.
        impl: 'auto' and 'bmm' for plain operations of torch, 'triton' for the kernels of this package.
        batch_last: features first, (n, ...) → (m, ...), instead of (..., n) → (..., m).
        device, dtype: of the parameters.
        chain_options: blocks, num_factors, row_splits and col_splits of `ks.chain.patterns.make_chain`.
    Raises:
        UsageError: a chain that does not fit the shape, or an impl that cannot run.
    """

    block_0: torch.nn.Parameter
    stored_transposed = False  # whether the replaced weight is (in, out) in its checkpoint, as that of Conv1D

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        bias: bool = False,
        *,
        chain: str = "monarch",
        impl: str = "auto",
        batch_last: bool = False,
        device=None,
        dtype=None,
        **chain_options,
    ):
        if isinstance(rank, bool):
            raise UsageError(f"rank {rank}: the third argument of KSLinear is the rank; write bias={rank}")
        patterns = make_chain(out_features, in_features, chain, **chain_options).patterns(rank)
        self._build(patterns, bias, impl, batch_last, device, dtype)
        self.reset_parameters()

    def _build(self, patterns, bias=False, impl="auto", batch_last=False, device=None, dtype=None):
        super().__init__()
        self.patterns = check_patterns(patterns)
        self.out_features, self.in_features = self.patterns[0].rows, self.patterns[-1].cols
        self.batch_last, self.impl = batch_last, impl
        self._layout = chain_layout(self.patterns, batch_last)
        self._names = tuple(f"block_{index}" for index in range(len(self.patterns)))
        for name, pattern in zip(self._names, self.patterns):
            self.register_parameter(name, torch.nn.Parameter(empty_blocks(pattern, device, dtype)))
        self.bias = torch.nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        choose_impl(impl, self.block_0.device)  # raises if it cannot run

    @classmethod
    def from_patterns(cls, patterns, bias: bool = False, **options) -> "KSLinear":
        """Build a layer from explicit patterns (a, b, c, d), output side first.

        Args:
            options: impl, batch_last, device and dtype, as the class's.
        Raises:
            UsageError: patterns that do not chain.
        """
        layer = cls.uninitialised(patterns, bias, **options)
        layer.reset_parameters()
        return layer

    @classmethod
    def uninitialised(cls, patterns, bias: bool = False, **options) -> "KSLinear":
        """Build the layer of `from_patterns` with uninitialised values, for a caller that writes them next."""
        layer = cls.__new__(cls)
        layer._build(patterns, bias, **options)
        return layer

    @property
    def blocks(self) -> list[torch.nn.Parameter]:
        """The parameters of the factors, output side first, each of shape (a·d, c, b)."""
        return [getattr(self, name) for name in self._names]

    @property
    def factors(self) -> list[torch.Tensor]:
        """The values of the factors, output side first: views (a, b, c, d) of `blocks`, so that writing into them
        changes the layer."""
        return [values_of(block, pattern) for block, pattern in zip(self.blocks, self.patterns)]

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in with the shape, dtype and device of nn.Linear.weight, and NaN for every value.

        `to_dense` returns W. Every call makes a new tensor, so that writing into it does not change the layer.
        """
        shape = (self.out_features, self.in_features)
        nan = torch.full((), math.nan, dtype=self.block_0.dtype, device=self.block_0.device)
        return nan.expand(shape[::-1] if self.stored_transposed else shape)

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        rank: int | None = None,
        *,
        patterns=None,
        bias=None,
        metric: MetricLike = None,
        impl: str = "auto",
        batch_last: bool = False,
        **chain_options,
    ) -> "KSLinear":
        """Compress a dense weight without training, so that tr(G (W − Ŵ) C (W − Ŵ)ᵀ) is small.

        Without `metric`, G = C = I and the factorisation is hierarchical (optimal for two factors). Inputs that
        couple column groups need a descent; `ks.bounds.factorize.factorize` states its cost.

        Args:
            weight: W, shape (m, n); its dtype and device are the layer's.
            rank: of the chain that `chain_options` (chain, blocks, num_factors, row_splits, col_splits) name.
            patterns: instead of a rank, explicit patterns that `ks.bounds.factorize.factorize` takes.
            bias: shape (m,), copied.
            metric: C = E[x xᵀ], the second moment of the inputs: a tensor of shape (n, n), or a `SecondMoment`; or a
                `Metric`, G ⊗ C.
            impl, batch_last: as the class's.
        Raises:
            UsageError: neither or both of rank and patterns, chain options beside patterns, or a chain that cannot be
                factorised, or moments that do not fit.
        """
        if (rank is None) == (patterns is None) or (patterns is not None and chain_options):
            raise UsageError("from_dense needs either a rank, with chain options, or patterns alone")
        if rank is not None:
            rows, cols = weight.shape
            patterns = make_chain(rows, cols, chain_options.pop("chain", "monarch"), **chain_options).patterns(rank)
        factors = factorize(weight, patterns, metric)
        place = {"device": weight.device, "dtype": weight.dtype}
        layer = cls.uninitialised(patterns, bias is not None, impl=impl, batch_last=batch_last, **place)
        with torch.no_grad():
            for parameter, values in zip(layer.factors, factors):
                parameter.copy_(values)
            if layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, rank: int | None = None, **options) -> "KSLinear":
        """Compress an nn.Linear, weight and bias, by `from_dense` with its options; the result can take its place."""
        if not isinstance(linear, torch.nn.Linear):
            raise UsageError(f"{type(linear).__name__}: an nn.Linear is needed; from_dense takes a weight")
        return cls.from_dense(linear.weight, rank, bias=linear.bias, **options)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values so that unit inputs give outputs of the variance 1/3 of a fresh nn.Linear; bias likewise.

        Every factor has variance 1/c, so that it keeps the variance of its input; the left-most one a third of that.
        """
        with torch.no_grad():
            for index, (block, pattern) in enumerate(zip(self.blocks, self.patterns)):
                variance = (1 if index else 1 / 3) / pattern.c
                block.normal_(0.0, math.sqrt(variance), generator=generator)
            if self.bias is not None:
                bound = self.in_features**-0.5
                self.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m), or (n, ...) to (m, ...) with `batch_last`."""
        return multiply(x, self.blocks, self._layout, self.bias, self.impl)

    def leave_blocks_to(self, consumer: "KSLinear") -> torch.Tensor:
        """Hand the outputs to another chain as this one makes them, which saves the permutation between the two.

        From then on, this layer returns (..., d, m/d) instead of (..., m), which functions of single values keep, and
        `consumer` takes that. Its inputs are then in another order: input i is output `rows[i]`, so that the weight to
        compress for it, or its first layer for trained ones, is W[:, rows]. Nothing is copied between the layers.

        Args:
            consumer: the only one that reads the outputs, through functions of single values if any; the d blocks of
                outputs are its groups of inputs, as of two grids with q = p.
        Returns:
            rows, the output of W behind each input of the consumer, shape (m,), int64 on the CPU.
        Raises:
            UsageError: the outputs lie in other blocks than the inputs, or another layout.
        """
        first, last = self.patterns[0], consumer.patterns[-1]
        if (first.a, first.d, first.b, self.batch_last) != (last.d, last.a, last.c, consumer.batch_last):
            raise UsageError(
                f"blocks of {first} cannot go to {last}: (1, b, c, d) and (d, b', b, 1) are needed, in one layout"
            )
        self._layout = self._layout._replace(runs=(), blocks_out=True, grid=None)
        consumer._layout = consumer._layout._replace(runs=(), blocks_in=True, grid=None)
        return torch.arange(self.out_features).view(-1, first.d).t().flatten()

    @property
    def hands_over_blocks(self) -> bool:
        """Whether `leave_blocks_to` has bound this layer to a neighbour."""
        return self._layout.blocks_in or self._layout.blocks_out

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """Load the factors of earlier files too, which hold values of shape (a, b, c, d) as factors.l."""
        for index, name in enumerate(self._names):
            values = state_dict.pop(f"{prefix}factors.{index}", None)
            if values is not None:
                state_dict[prefix + name] = blocks_of(values).contiguous() if values.dim() == 4 else values
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def to_dense(self) -> torch.Tensor:
        """Return W = K_1 … K_L as a tensor of shape (m, n), in the layer's dtype and on its device (bias left out)."""
        with torch.autocast(self.block_0.device.type, enabled=False):
            return dense_chain(self.factors)

    @property
    def num_parameters(self) -> int:
        """The number of free values of the chain and the bias."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, path) -> None:
        """Write patterns, values, bias and layout to `path`; `ks.load(path)` needs nothing else."""
        torch.save(self.to_payload(), path)

    def to_payload(self) -> dict:
        """Return the content of a saved file: plain values and tensors, readable with weights_only=True.

        Raises:
            UsageError: the layer takes or leaves features in blocks, which belongs to its model, not to the file.
        """
        if self.hands_over_blocks:
            raise UsageError("a chain that takes or leaves features in blocks is saved by the state_dict of its model")
        tensors = {f"factors.{index}": factor for index, factor in enumerate(self.factors)}
        if self.bias is not None:
            tensors["bias"] = self.bias
        return {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "patterns": [list(pattern) for pattern in self.patterns],
            "batch_last": self.batch_last,
            "state_dict": {name: tensor.detach().cpu() for name, tensor in tensors.items()},
        }

    @classmethod
    def load(cls, path, *, bias: torch.Tensor | None = None, impl: str = "auto", device=None) -> "KSLinear":
        """Load a saved chain, so that y = x Ŵᵀ + bias.

        Args:
            path: a file that `save` or the training script wrote. The script trains on the weight alone, so that the
                file has the bias of the original layer only if `save` wrote it.
            bias: of the original layer, shape (m,), any float dtype; added to the bias that the file has, which is the
                (W − Ŵ) E[x] of `--fit_bias`. The sum has the dtype of the chain.
            impl: backend, as the class's.
            device: of the layer; the CPU by default.
        Raises:
            UsageError: not such a file, or of a newer version; or a bias of another shape, not floating or not finite.
        """
        from ks.files.schema import SavedChain, convert  # it needs msgspec, which the layer itself does not

        payload = read_torch_file(path, "a saved chain")
        if not isinstance(payload, dict) or payload.get("format") != FILE_FORMAT:
            raise UsageError(f"{path} is not a saved chain; a file written by KSLinear.save is needed")
        saved = convert(payload, SavedChain, f"saved chain {path}")
        if saved.version > FILE_VERSION:
            raise UsageError(f"{path} has format version {saved.version}; this program reads up to {FILE_VERSION}")
        patterns = check_patterns(saved.patterns)
        _check_state(saved.state_dict, patterns, str(path))
        state = saved.state_dict
        if bias is not None:
            state = {**state, "bias": _added_bias(bias, state, patterns[0].rows)}
        place = {"device": device, "dtype": state["factors.0"].dtype}
        layer = cls.uninitialised(patterns, "bias" in state, impl=impl, batch_last=saved.batch_last, **place)
        layer.load_state_dict(state)
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"patterns={' '.join(map(str, self.patterns))}, batch_last={self.batch_last}"
        )


def _added_bias(bias: torch.Tensor, state: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
    """Return a bias plus the one of a saved chain, in float64.

    Raises:
        UsageError: another shape than (m,), not floating, or not finite.
    """
    if bias.shape != (rows,) or not bias.is_floating_point():
        given = f"shape {tuple(bias.shape)} and {bias.dtype}"
        raise UsageError(f"bias of {given}: a floating tensor of shape ({rows},) is needed, one value for each output")
    wide = bias.detach().to("cpu", torch.float64)
    if not wide.isfinite().all():
        raise UsageError("the bias holds NaN or infinite values; finite ones are needed")
    return wide + state.get("bias", torch.zeros(())).double()


def _check_state(state: dict[str, torch.Tensor], patterns: Sequence[Pattern], where: str) -> None:
    """Compare the tensors of a saved chain with its patterns, before anything is allocated.

    Raises:
        UsageError: a tensor is missing, or has another shape or no float dtype.
    """
    expected: dict[str, tuple[int, ...]] = {f"factors.{index}": pattern for index, pattern in enumerate(patterns)}
    if "bias" in state:
        expected["bias"] = (patterns[0].rows,)
    if state.keys() != expected.keys():
        raise UsageError(f"{where} is not valid: it holds {sorted(state)}, its patterns need {sorted(expected)}")
    check_fits(where, 2 * sum(tensor.numel() * tensor.element_size() for tensor in state.values()), "use a smaller one")
    for name, shape in expected.items():
        tensor = plain(state[name], f"{where}, {name}")
        if tuple(tensor.shape) != tuple(shape) or not tensor.is_floating_point():
            raise UsageError(
                f"{where} is not valid: {name} has shape {tuple(tensor.shape)} and {tensor.dtype}, its pattern needs "
                f"floating values of shape {tuple(shape)}"
            )


load = KSLinear.load
