"""Inputs of a layer of every kind, and problems with them: shared by the tests."""

import torch

from ks.cli.flags import TrainerConfig
from ks.cli.parser import Parser
from ks.training.criterion_identity import TOOLKIT
from ks.training.problem import resolve

KINDS = ("regular", "steep", "fewer than features", "unused feature")
WEIGHT = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))


def layer_rows(kind, count=120, cols=24, seed=0):
    """Return inputs with a mean, shape (count, n), float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    if kind == "steep":  # C has a condition of 1e10
        mixing = torch.linalg.qr(mixing)[0] * torch.logspace(0, -5, cols, dtype=torch.float64)
        mixing = mixing @ torch.linalg.qr(torch.randn(cols, cols, dtype=torch.float64, generator=generator))[0]
    if kind == "unused feature":
        mixing[:, 5] = 0
    rows = torch.randn(count, cols, dtype=torch.float64, generator=generator) @ mixing
    rows += 0.5 * mixing[0]
    return rows[: cols // 3] if kind == "fewer than features" else rows


def second_moment(rows, centre=None):
    rows = rows if centre is None else rows - centre
    return rows.t() @ rows / len(rows)


def problem_of(folder, *flags, weight=WEIGHT, edits=TOOLKIT):
    """Return (configuration, problem) of a command line; the weight is saved in the folder."""
    torch.save(weight, folder / "w.pth")
    arguments = ["--weight_path", folder / "w.pth", "--device", "cpu", "--num_samples", 400, *flags]
    config = Parser(TrainerConfig, "").parse([str(argument) for argument in arguments])
    return config, resolve(config, edits)
