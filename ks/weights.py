"""Dense weights: load a 2-D weight from a file, save one, make test weights."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from ks.patterns import Chain

INIT_METHODS = (
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "normal",
    "exact_chain",
    "lowrank_plus_noise",
    "power_law",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUFFIXES = (".pth", ".pt", ".safetensors", ".npy")


class Weight(NamedTuple):
    """A loaded weight: the m × n tensor in its stored dtype on the CPU, and the key that it had in its file."""

    tensor: torch.Tensor
    key: str | None

    def sha256(self) -> str:
        """Hash of shape, dtype and values: the same weight in another file has the same hash."""
        data = self.tensor.contiguous()
        head = f"{tuple(data.shape)} {data.dtype}".encode()
        return hashlib.sha256(head + data.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def packed(weight: Weight, transpose: bool = False) -> bytes:
    """The content of a .pth file with this weight alone, which `load_weight` reads with the same key and transpose."""
    tensor = weight.tensor.t() if transpose else weight.tensor
    buffer = io.BytesIO()
    torch.save({weight.key: tensor.contiguous()} if weight.key else tensor.contiguous(), buffer)
    return buffer.getvalue()


def load_weight(path, key: str | None = None, transpose: bool = False) -> Weight:
    """Load one 2-D weight.

    Args:
        path: .pth or .pt (tensor, Parameter, state_dict or nested dicts and lists of them), .safetensors or .npy.
        key: name of the tensor in the file, nested names joined by dots; may be left out where the file holds
            exactly one 2-D floating tensor.
        transpose: for weights stored as (in, out).
    Returns:
        the weight, shape (m, n) = (out_features, in_features), dtype as stored.
    Raises:
        ValueError: anything that is not one finite, non-zero, real 2-D weight; the message names the candidates.
    """
    path = Path(path)
    tensors = _read_file(path)
    if key is None:
        key = _only_candidate(path, tensors)
    elif key not in tensors:
        raise ValueError(f"{path} has no key {key!r}; {_candidates(tensors)}")
    tensor = tensors[key]() if callable(tensors[key]) else tensors[key]
    where = f"{path}, key {key!r}" if key else f"{path}"
    _check_weight(where, tensor)
    return Weight(tensor.t().contiguous() if transpose else tensor.contiguous(), key or None)


def _read_file(path: Path) -> dict:
    """Every tensor of the file by name ('' for a lone one); safetensors entries are loaded only when called."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; a file ({', '.join(SUFFIXES)}) is needed")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: suffix {path.suffix!r} is not known; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
    try:
        if path.suffix == ".npy":
            return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _flatten(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as weights: it is no torch file, or it holds Python objects; save tensors, as in "
            "torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a corrupt file can raise nearly anything, out of three libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__}: {reason})") from error


class _Lazy:
    """One entry of a .safetensors file: its shape and type are known, its values are read when called."""

    def __init__(self, path: Path, name: str, file):
        self.path, self.name = path, name
        self.shape = tuple(file.get_slice(name).get_shape())
        self.is_real_floating = file.get_slice(name).get_dtype() in ("F64", "F32", "F16", "BF16")

    def __call__(self) -> torch.Tensor:
        with safetensors.safe_open(self.path, framework="pt", device="cpu") as file:
            return file.get_tensor(self.name)


def _read_safetensors(path: Path) -> dict:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {name: _Lazy(path, name, file) for name in file.keys()}  # noqa: SIM118, it is no dict


def _flatten(node, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return {name: node.detach()}
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {}
    return {
        full: tensor
        for part, child in items
        for full, tensor in _flatten(child, f"{name}.{part}" if name else str(part)).items()
    }


def _is_candidate(entry) -> bool:
    floating = entry.is_real_floating if isinstance(entry, _Lazy) else entry.is_floating_point()
    return len(entry.shape) == 2 and floating


def _candidates(tensors: dict, limit: int = 20) -> str:
    found = [f"{name} {tuple(entry.shape)}" for name, entry in tensors.items() if _is_candidate(entry)]
    if not found:
        shapes = ", ".join(f"{name} {tuple(entry.shape)}" for name, entry in list(tensors.items())[:limit])
        return f"it holds no 2-D floating weight (found: {shapes or 'no tensor at all'})"
    more = f", … ({len(found)} in all)" if len(found) > limit else ""
    return f"2-D weights in it: {', '.join(found[:limit])}{more}"


def _only_candidate(path: Path, tensors: dict) -> str:
    if list(tensors) == [""]:
        return ""
    names = [name for name, entry in tensors.items() if _is_candidate(entry)]
    if len(names) != 1:
        advice = "; choose one with --weight_key" if names else ""
        raise ValueError(f"{path}: {_candidates(tensors)}{advice}")
    return names[0]


def _check_weight(where: str, tensor: torch.Tensor) -> None:
    shape = tuple(tensor.shape)
    if tensor.dtype not in (torch.float64, *DTYPES.values()):
        allowed = "float64, float32, float16 or bfloat16"
        raise ValueError(f"{where} has dtype {str(tensor.dtype).removeprefix('torch.')}; {allowed} is needed")
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ValueError(f"{where} has shape {shape}; a non-empty 2-D weight (out_features, in_features) is needed")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{where} holds NaN or infinite values; finite values are needed")
    if not tensor.any():
        raise ValueError(f"{where} is all zero: there is nothing to learn, and no relative loss")


def save_weight(tensor: torch.Tensor, path) -> None:
    """Save a weight as the suffix says: .pth and .pt hold the tensor, .safetensors names it 'weight', .npy is plain.

    Raises:
        ValueError: unknown suffix, or a dtype that the format lacks (bfloat16 in .npy).
    """
    path = Path(path)
    if path.suffix == ".npy":
        if tensor.dtype == torch.bfloat16:
            raise ValueError(f"{path}: .npy has no bfloat16; use .pth or .safetensors")
        with open(path, "wb") as file:
            np.save(file, tensor.numpy())
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file({"weight": tensor}, path)
    elif path.suffix in SUFFIXES:
        torch.save(tensor, path)
    else:
        raise ValueError(f"{path}: suffix {path.suffix!r} is not known; use one of {', '.join(SUFFIXES)}")


def make_weight(
    rows: int,
    cols: int,
    method: str,
    *,
    seed: int = 0,
    chain: Chain | None = None,
    rank: int = 8,
    noise: float = 0.1,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Make a test weight in float32.

    xavier_*, kaiming_* (fan in, ReLU gain) and normal (standard deviation 1/√n) are independent entries.
    exact_chain: a random chain of rank `rank`, so that its study falls to zero at that rank.
    lowrank_plus_noise: U Vᵀ of rank `rank` plus noise of `noise` times its Frobenius norm.
    power_law: U diag(k^-alpha) Vᵀ with random orthogonal U, V.
    The structured kinds are scaled to ‖W‖_F² = m, so that predicting 0 has a loss of 1 on unit inputs.

    Args:
        rows, cols: m and n.
        method: one of `INIT_METHODS`.
        seed: of the random generator.
        chain: the family for exact_chain.
        rank: for exact_chain and lowrank_plus_noise.
        noise: ratio of Frobenius norms, noise to signal.
        alpha: exponent of the singular values.
    Returns:
        float32 tensor of shape (m, n).
    Raises:
        ValueError: unknown method, sizes below 1, rank below 1, negative noise.
    """
    if rows < 1 or cols < 1:
        raise ValueError(f"a {rows} × {cols} weight: both sides must be at least 1")
    if method not in INIT_METHODS:
        raise ValueError(f"init_method {method!r}: choose one of {', '.join(INIT_METHODS)}")
    if rank < 1 or noise < 0:
        raise ValueError(f"rank {rank} and noise {noise}: at least 1 and at least 0 are needed")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(rows, cols)
    if method.startswith("xavier"):
        return getattr(torch.nn.init, f"{method}_")(weight, generator=generator)
    if method.startswith("kaiming"):
        return getattr(torch.nn.init, f"{method}_")(weight, nonlinearity="relu", generator=generator)
    if method == "normal":
        return weight.normal_(0.0, cols**-0.5, generator=generator)
    if method == "exact_chain":
        weight = _random_chain(chain, rank, generator)
    elif method == "lowrank_plus_noise":
        left, right = (torch.randn(side, rank, generator=generator) for side in (rows, cols))
        signal, disturbance = left @ right.t(), torch.randn(rows, cols, generator=generator)
        weight = signal + disturbance * (noise * signal.norm() / disturbance.norm())
    else:
        size = min(rows, cols)
        left, right = (torch.linalg.qr(torch.randn(side, size, generator=generator))[0] for side in (rows, cols))
        weight = (left * torch.arange(1, size + 1).float() ** -alpha) @ right.t()
    return weight * (rows**0.5 / weight.norm())


def _random_chain(chain: Chain, rank: int, generator: torch.Generator) -> torch.Tensor:
    from ks.ops import chain_product

    values = [torch.randn(*pattern, generator=generator) * pattern.c**-0.5 for pattern in chain.patterns(rank)]
    return chain_product(torch.eye(chain.cols), values).t().contiguous()
