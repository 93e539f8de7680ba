import pytest
import torch

from ks.chain.patterns import make_chain
from ks.files.make_weight import INIT_METHODS, make_weight


@pytest.mark.parametrize("method", INIT_METHODS)
def test_every_method_is_seeded_and_finite(method):
    chain = make_chain(12, 20)
    weight = make_weight(12, 20, method, seed=3, chain=chain, rank=2)
    assert weight.shape == (12, 20)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, make_weight(12, 20, method, seed=3, chain=chain, rank=2))
    assert not torch.equal(weight, make_weight(12, 20, method, seed=4, chain=chain, rank=2))


def test_random_kinds_have_their_spread():
    for method, std in {
        "xavier_normal": (2 / 900) ** 0.5,
        "kaiming_uniform": (2 / 500) ** 0.5,
        "normal": 0.002**0.5,
    }.items():
        assert make_weight(400, 500, method).std().item() == pytest.approx(std, rel=0.02)


def test_structured_kinds_have_their_structure():
    chain = make_chain(24, 32)
    exact = make_weight(24, 32, "exact_chain", chain=chain, rank=2).reshape(6, 4, 4, 8).permute(1, 2, 0, 3)
    assert torch.linalg.matrix_rank(exact, rtol=1e-4).unique().tolist() == [2]
    noisy = torch.linalg.svdvals(make_weight(60, 80, "lowrank_plus_noise", rank=5, noise=0.01))
    assert noisy[5] < 0.05 * noisy[4]
    values = torch.linalg.svdvals(make_weight(30, 40, "power_law", alpha=0.5))
    torch.testing.assert_close(values / values[0], torch.arange(1, 31).float() ** -0.5, rtol=1e-3, atol=1e-4)
