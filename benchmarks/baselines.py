"""Our training step without its script, and what benchmarks compare it with: the plain loop and a peer."""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ks.chain.bmm import empty_values
from ks.chain.passes import ChainPasses
from ks.chain.patterns import Pattern
from ks.training.criterion import loss_and_gradient, mean_squared_error


def training_factors(layer) -> list[torch.Tensor]:
    """Return copies of the values of a layer in the memory order of `train_with_random.py`."""
    return [empty_values(factor.shape, factor.device).copy_(factor.detach()) for factor in layer.factors]


def our_step(passes: ChainPasses, factors, optimizer):
    """Return the step of `train_with_random.py`, for targets in the order of `passes.output_rows`."""

    def step(inputs, targets, lr):
        prediction, *inner = passes.forward(inputs, factors)
        loss, gradient = loss_and_gradient(mean_squared_error, prediction, targets, optimizer.scale(lr))
        passes.backward(gradient, inputs, factors, inner, **optimizer.destination)
        return loss, optimizer.update(lr, loss)

    return step


class PlainChain(torch.nn.Module):
    """A chain by torch.bmm on permuted copies: one intermediate and two copies per factor, autograd for the rest.

    Args:
        values: of our layer, shapes (a, b, c, d), output side first; copied as (a·d, c, b).
    """

    def __init__(self, values):
        super().__init__()
        self.patterns = [Pattern(*factor.shape) for factor in values]
        self.weights = torch.nn.ParameterList(
            factor.detach().permute(0, 3, 2, 1).flatten(0, 1).clone().contiguous() for factor in values
        )

    def forward(self, x):
        batch = x.shape[0]
        for (a, b, c, d), weight in zip(self.patterns[::-1], reversed(self.weights)):
            blocks = x.view(batch, a, c, d).permute(1, 3, 0, 2).reshape(a * d, batch, c)
            x = torch.bmm(blocks, weight).view(a, d, batch, b).permute(2, 0, 3, 1).reshape(batch, a * b * d)
        return x


def plain_epochs(model, weight, inputs, num_epochs: int, batch_size: int, lr: float = 1e-3, max_grad_norm: float = 1.0):
    """Train as most scripts do: shuffle rows, compute targets in every step, use AdamW, read every loss on the host.

    Args:
        model: maps (batch, n) to (batch, m).
        weight: W, shape (m, n).
        inputs: shape (N, n).
    Returns:
        the mean loss of every epoch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    losses = []
    for _ in range(num_epochs):
        total, steps = 0.0, 0
        for rows in torch.randperm(len(inputs), device=inputs.device).split(batch_size):
            x = inputs[rows]
            target = x @ weight.t()
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        scheduler.step()
        losses.append(total / steps)
    return losses


def torch_structured_multiply():
    """Return the two-factor product of torch-structured, `blockdiag_butterfly_multiply`; None if not installed."""
    if importlib.util.find_spec("torch_structured") is None:
        return None
    from torch_structured.monarch.blockdiag_butterfly_multiply import blockdiag_butterfly_multiply

    return blockdiag_butterfly_multiply


def structured_weights(values):
    """Return the two factors of our layer as torch-structured takes them: (p, q·r, n/p) and (q, m/q, p·r)."""
    left, right = values
    return right.detach()[..., 0].clone(), left.detach()[0].permute(2, 0, 1).contiguous()
