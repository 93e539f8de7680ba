"""The chain under torch.compile: one opaque operator, no graph break, the same numbers."""

import pytest
import torch

from ks.layer import KSLinear
from ks.product.operator import chain_product


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Net(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = KSLinear(24, 36, 3, bias=True, **options)

    def forward(self, x):
        return torch.relu(self.layer(torch.sin(x))) * 2


@pytest.mark.parametrize("options", [{}, {"batch_last": True}, {"chain": "butterfly"}], ids=str)
def test_a_compiled_network_has_no_graph_break_and_equal_gradients(options):
    torch.manual_seed(0)
    net = Net(**options) if "batch_last" not in options else KSLinear(24, 36, 3, **options)
    x = torch.randn(*((24, 5) if "batch_last" in options else (5, 24)), requires_grad=True)
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    wanted = [x, *net.parameters()]
    for ours, theirs in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)):
        torch.testing.assert_close(ours, theirs)


def test_dynamic_batches_and_autocast():
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 7, 300):
        x = torch.randn(batch, 24)
        torch.testing.assert_close(compiled(x), net(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(torch.randn(4, 24)).dtype == net(torch.randn(4, 24)).dtype


@pytest.mark.parametrize("batch", [4, 300])
def test_the_operators_keep_their_promises(batch):
    """Schema, fake implementation (shapes, strides, dtype) and their registrations, by torch's own checker."""
    layer = KSLinear(16, 16, 1, chain="lowrank_butterfly")
    values = [factor.detach() for factor in layer.factors]
    x = torch.randn(batch, 16)
    y, *inner = torch.ops.ks.chain(x, values, False, "auto", "ieee", True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ks.chain, (x, values, False, "auto", "ieee", True), test_utils=checks)
    torch.library.opcheck(torch.ops.ks.chain, (x.t(), values, True, "auto", "ieee", False), test_utils=checks)
    needed = [True] + [index != 1 for index in range(len(values))]
    arguments = (y, x, values, inner, False, "auto", "ieee", needed)
    torch.library.opcheck(torch.ops.ks.chain_backward, arguments, test_utils=checks)


def test_functional_and_layer_agree_under_compile():
    layer = KSLinear(24, 36, 3)
    compiled = torch.compile(chain_product, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(compiled(x, list(layer.factors)), layer(x))
