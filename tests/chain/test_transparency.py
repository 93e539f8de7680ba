"""What sees through plain operations of torch sees through a layer: compilers, exporters, transforms, meta, copies."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.trace_rules
from torch.func import functional_call, grad, jacrev, jvp, vmap

from ks.chain.merge import MERGE_BATCH
from ks.layer import KSLinear

# The compiler notes the functions of torch once; another test of this process may have replaced one of them by then.
torch._dynamo.trace_rules.get_torch_obj_rule_map()


class Dense(torch.nn.Module):
    """The oracle: the same weight, as nn.Linear."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(layer.to_dense()), layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def network(make):
    return torch.nn.Sequential(make, torch.nn.GELU())


@pytest.fixture(params=["monarch", "butterfly", "lowrank", "lowrank_butterfly"])
def pair(request):
    """A layer of one family and its dense twin, each with an activation behind it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = KSLinear(48, 96, 5, bias=True, chain=request.param)
    return network(layer), network(Dense(layer))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_graph_breaks(pair, dynamic):
    ours, dense = pair
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 7, MERGE_BATCH + 1) if dynamic else (5,):
        x = torch.randn(batch, 48, requires_grad=True)
        y, expected = compiled(x), dense(x)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
        wanted = [x, ours[0].bias]
        for mine, other in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_exported_with_a_dynamic_batch_and_traced_at_another_one(pair, gradients):
    ours, dense = pair
    ours.requires_grad_(gradients)
    x = torch.randn(4, 48)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    traced = torch.jit.trace(ours, x)
    for batch in (2, 7, 3 * MERGE_BATCH):
        x = torch.randn(batch, 48)
        for program in (exported, traced):
            torch.testing.assert_close(program(x), dense(x), atol=1e-5, rtol=1e-4)


def test_transforms(pair):
    ours, dense = pair
    x, tangent = torch.randn(4, 48), torch.randn(4, 48)
    calls = [
        lambda model: vmap(model)(torch.stack([x, tangent])),
        lambda model: jvp(model, (x,), (tangent,))[1],
        lambda model: jacrev(model)(x[0]),
        lambda model: jacrev(jacrev(lambda z: model(z).sum()))(x[0]),
    ]
    for call in calls:
        torch.testing.assert_close(call(ours), call(dense), atol=1e-4, rtol=1e-4)
    parameters = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    per_sample = vmap(grad(lambda p, z: functional_call(ours, p, (z[None],)).square().sum()), (None, 0))(parameters, x)
    ours(x).square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, atol=1e-4, rtol=1e-4)


def test_on_meta_copied_pickled_and_parametrised(pair):
    ours, _ = pair
    x = torch.randn(4, 48)
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).shape == (4, 96)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), ours(x))
    doubled = copy.deepcopy(ours)
    torch.nn.utils.parametrize.register_parametrization(doubled[0], "block_0", Doubled())
    expected = 2 * (ours[0](x) - ours[0].bias) + ours[0].bias
    torch.testing.assert_close(doubled[0](x), expected)


class Doubled(torch.nn.Module):
    def forward(self, block):
        return 2 * block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_gives_the_dtypes_of_nn_linear(pair, dtype):
    ours, dense = pair[0].to(dtype), pair[1].to(dtype)
    x = torch.randn(3, 48, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), dense(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in ours.parameters()} == {dtype}


def test_autocast_casts_the_factors_of_an_inference_once():
    layer, x = KSLinear(16, 32, 3), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer(x)
        with torch.profiler.profile() as profiler:
            layer(x)
    casts = [event for event in profiler.events() if event.name == "aten::_to_copy"]
    assert len(casts) == 1  # x itself


def test_float32_products_follow_the_global_setting(monkeypatch):
    """As nn.Linear does: no call sets the precision that the user chose."""
    seen, multiply = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *operands: seen.append(setting()) or multiply(*operands))

    def setting():
        return torch.get_float32_matmul_precision()

    before = setting()
    try:
        torch.set_float32_matmul_precision("medium")
        KSLinear(16, 32, 3)(torch.randn(4, 16))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["medium"] * 2


def test_data_parallel_gradients_are_those_of_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, x = KSLinear(16, 32, 3, bias=True), torch.randn(4, 16)
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch.nn.parallel.DistributedDataParallel(layer)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(layer.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
