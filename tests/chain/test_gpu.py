"""What only a CUDA device can show: bfloat16, tensor cores, CUDA graphs, a run on the card. `make test-gpu`."""

import copy

import pytest
import torch
from kernel_cases import CASES, STUDY_CASES, check_multiply

from ks.chain.passes import ChainPasses
from ks.chain.patterns import make_chain
from ks.layer import KSLinear
from ks.training.criterion import loss_and_gradient, mean_squared_error
from ks.training.optimizer import Optimizer
from ks.training.samples import Samples
from ks.training.steps import CapturedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels():
    from ks.chain import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STUDY_CASES + CASES, ids=str)
def test_the_kernel(kernels, case, dtype):
    check_multiply(kernels.multiply, case, dtype, "cuda")


def test_tensor_float_precision(kernels):
    """It keeps 10 bits of each operand."""
    left, right = torch.randn(1, 4, 512, 64, device="cuda"), torch.randn(1, 4, 64, 500, device="cuda")
    out, exact = torch.empty(1, 4, 512, 500, device="cuda"), left.double() @ right.double()
    kernels.multiply(left, right, out, precision="tf32")
    assert (out - exact).norm() / exact.norm() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 33, 1024])
def test_the_layer_on_the_card_is_that_of_the_cpu(dtype, batch):
    """Under autocast and compiled too, from inputs that are not contiguous."""
    layer = KSLinear(512, 256, 16, bias=True, dtype=torch.float64)
    x = torch.randn(512, batch, dtype=torch.float64).t()
    expected, card, z = layer(x), copy.deepcopy(layer).to("cuda", dtype), x.to("cuda", dtype)
    tolerance = {"atol": 64 * torch.finfo(dtype).eps, "rtol": 0.0}
    torch.testing.assert_close(card(z).double().cpu(), expected, **tolerance)
    torch.testing.assert_close(torch.compile(card, dynamic=True)(z).double().cpu(), expected, **tolerance)
    with torch.autocast("cuda", torch.bfloat16):
        y = copy.deepcopy(layer).to("cuda", torch.float32)(z.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double().cpu(), expected, atol=0.5, rtol=0.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_kernels_run_on_the_device_of_their_operands(kernels):
    check_multiply(kernels.multiply, STUDY_CASES[0], torch.float32, "cuda:1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [32, 8192])
def test_the_chain_in_a_cuda_graph(dtype, batch):
    layer = KSLinear(4096, 2048, 16, device="cuda", dtype=dtype)
    x = torch.randn(batch, 4096, device="cuda", dtype=dtype)
    expected = layer(x).detach()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_captured_step_equals_the_eager_one(dtype):
    weight = torch.randn(256, 512, device="cuda")

    def train(make):
        torch.manual_seed(0)
        factors = [factor.detach() for factor in KSLinear(512, 256, 8, device="cuda").factors]
        samples = Samples(weight, 3200, 32, 32, sampling="whitened", seed=0, dtype=dtype)
        optimizer = Optimizer("adamw", factors, loss_scaling=dtype == torch.float16)
        passes = ChainPasses(make_chain(256, 512).patterns(8))

        def step(inputs, targets, lr):
            values = [factor.to(dtype) for factor in factors]
            y, *inner = passes.forward(inputs, values)
            loss, gradient = loss_and_gradient(mean_squared_error, y, targets, optimizer.scale(1e-3))
            passes.backward(gradient, inputs, values, inner, out=optimizer.gradients)
            return loss, optimizer.update(lr, loss)

        take_step = make(step, samples, optimizer.state())
        losses = [take_step(x, y, 1e-3)[0] for number in (1, 2) for _, x, y in samples.epoch(number)]
        return [torch.stack(losses), *factors]

    def eager_step(step, samples, state):
        """A captured step reads its rate as float32 from the card; in float64 it rounds another way."""
        return lambda x, y, lr: step(x, y, torch.tensor(lr, device="cuda"))

    eager = train(eager_step)
    captured = train(lambda step, samples, state: CapturedStep(step, *samples.first(), state))
    for ours, theirs in zip(captured, eager):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_training_on_the_card(run, weight_path, tmp_path, dtype):
    read_curves = pytest.importorskip("ks.files.curves").read_curves
    flags = ("--num_samples", 800, "--num_epochs", 30, "--rank", 2, "--dtype", dtype)
    done = run("train_with_random.py", "--weight_path", weight_path, "--device", "cuda", *flags)
    assert done.returncode == 0, done.stderr
    assert "captured as a CUDA graph" in done.stderr
    curves = read_curves(tmp_path / "trained_models" / "ks_chain_rank_2_loss_curves.csv")
    assert curves[-1]["val_loss"] < curves[0]["val_loss"]


def test_impl_triton_and_bmm_train_alike(run, weight_path, tmp_path):
    read_curves = pytest.importorskip("ks.files.curves").read_curves
    losses = []
    for impl in ("triton", "bmm"):
        out = ("--output_dir", impl, "--impl", impl, "--device", "cuda")
        done = run("train_with_random.py", "--weight_path", weight_path, "--num_samples", 800, "--num_epochs", 3, *out)
        assert done.returncode == 0, done.stderr
        losses.append(read_curves(tmp_path / impl / "ks_chain_rank_4_loss_curves.csv")[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
