"""Small models whose linear layers are observed."""

import torch
from torch.nn import Linear


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(torch.nn.Module):
    """Query, key and value share their input; output has its own. The layers are below `encoder.layer.0`."""

    def __init__(self, width=6, inner=10):
        super().__init__()
        names = ("query", "key", "value", "output")
        layer = torch.nn.ModuleDict({name: Linear(width, width) for name in names})
        layer["up"] = Linear(width, inner)
        layer["dropout"] = torch.nn.Dropout(0.5)
        self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList([layer])})

    def forward(self, x, attention_mask=None):
        layer = self.encoder["layer"][0]
        x = layer["dropout"](x)
        mixed = layer["query"](x) + layer["key"](x) * layer["value"](x)
        return layer["up"](layer["output"](mixed))


class Calls(torch.nn.Module):
    """Two layers, and how they are called."""

    def __init__(self, call, width=5):
        super().__init__()
        self.first, self.second, self.call = Linear(width, width), Linear(width, width), call

    def forward(self, x):
        return self.call(self, x)


class Conv1D(torch.nn.Module):
    """What transformers calls Conv1D: y = x W + b with W of shape (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


Conv1D.__module__ = "transformers.pytorch_utils"


def hand_computed(rows):
    """Σ x xᵀ and Σ x in float64, by einsum."""
    rows = rows.reshape(-1, rows.shape[-1]).double()
    return torch.einsum("ni,nj->ij", rows, rows), rows.sum(0)


def agrees(sums, rows, tolerance=1e-12):
    """Check sums against those of rows, with a tolerance relative to the largest entry."""
    for found, expected in zip((sums.sum_xx, sums.sum_x), hand_computed(rows)):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert sums.count == rows.numel() // rows.shape[-1]


def squares(output, batch):
    """A loss: the sum of the squared outputs."""
    return output.square().sum()
