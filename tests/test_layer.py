import itertools

import pytest
import torch

import ks
from ks.bounds.floors import loss_floor
from ks.bounds.population_loss import population_loss
from ks.chain.reference import chain_to_dense
from ks.errors import UsageError
from ks.layer import KSLinear
from ks.moments.second_moment import SecondMoment


def test_it_behaves_as_the_linear_layer_of_its_dense_weight():
    layer = KSLinear(24, 36, rank=3, bias=True)
    linear = torch.nn.Linear(24, 36)
    with torch.no_grad():
        linear.weight.copy_(chain_to_dense(list(layer.factors)))
        linear.bias.copy_(layer.bias)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.to_dense(), linear.weight, check_stride=False)
    assert (layer.in_features, layer.out_features) == (24, 36)
    assert layer.num_parameters == 3 * (24 * 4 + 36 * 4) + 36


@pytest.mark.parametrize("family", ["monarch", "lowrank", "butterfly", "lowrank_butterfly"])
def test_a_fresh_layer_has_the_output_variance_of_a_fresh_linear(family):
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    ours = sum(KSLinear(256, 128, rank=32, chain=family)(x).var() for _ in range(10)) / 10
    theirs = torch.nn.Linear(256, 128, bias=False)(x).var()
    assert 0.5 < ours / theirs < 2.0


def test_no_bias_by_default_and_dtype_and_device_honoured():
    layer = KSLinear(8, 8, device="meta", dtype=torch.bfloat16)
    assert layer.bias is None
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_repr_names_sizes_and_patterns():
    text = repr(KSLinear(8, 16, rank=2))
    assert "in_features=8, out_features=16, bias=False" in text
    assert "(1, 4, 8, 4) (4, 8, 2, 1)" in text


@pytest.mark.parametrize("bias", [False, True])
def test_save_and_load_need_no_arguments(tmp_path, bias):
    layer = KSLinear(24, 36, rank=3, bias=bias, batch_last=True).to(torch.float64)
    layer.save(tmp_path / "chain.pth")
    loaded = ks.load(tmp_path / "chain.pth")
    assert loaded.patterns == layer.patterns
    assert loaded.batch_last
    x = torch.randn(24, 2, dtype=torch.float64)
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("saved_bias", [False, True])
def test_the_bias_of_the_original_layer_is_added_on_loading(tmp_path, saved_bias, dtype):
    layer = KSLinear(24, 36, rank=3, bias=saved_bias, batch_last=saved_bias, dtype=torch.float64)
    layer.save(tmp_path / "chain.pth")
    bias = torch.nn.Parameter(torch.randn(36, dtype=dtype))
    loaded = ks.load(tmp_path / "chain.pth", bias=bias)
    assert loaded.bias.dtype == torch.float64
    assert loaded.bias.requires_grad
    x = torch.randn(24, 2, dtype=torch.float64) if saved_bias else torch.randn(2, 24, dtype=torch.float64)
    added = bias.detach().double().clone()
    torch.testing.assert_close(loaded(x), layer(x) + (added[:, None] if saved_bias else added))
    with torch.no_grad():
        bias.zero_()  # the loaded layer has values of its own
    torch.testing.assert_close(loaded(x), layer(x) + (added[:, None] if saved_bias else added))
    ks.load(tmp_path / "chain.pth").load_state_dict(layer.state_dict())  # the file is as it was


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(24), r"bias of shape \(24,\) and torch.float32: a floating tensor of shape \(36,\) is needed"),
        (torch.zeros(36, 1), r"bias of shape \(36, 1\)"),
        (torch.zeros(36, dtype=torch.int64), "torch.int64"),
        (torch.full((36,), float("nan")), "NaN or infinite"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(tmp_path, bias, message):
    KSLinear(24, 36, rank=3).save(tmp_path / "chain.pth")
    with pytest.raises(UsageError, match=message):
        ks.load(tmp_path / "chain.pth", bias=bias)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_moves_between_layers_and_one_of_earlier_files_loads_to_the_same_numbers(assign):
    source = torch.nn.Sequential(KSLinear(24, 36, rank=3, bias=True))
    assert list(source.state_dict()) == ["0.block_0", "0.block_1", "0.bias"]
    earlier = {f"0.factors.{index}": factor.detach().contiguous() for index, factor in enumerate(source[0].factors)}
    for state in (source.state_dict(), earlier | {"0.bias": source[0].bias}):
        target = torch.nn.Sequential(KSLinear(24, 36, rank=3, bias=True))
        target.load_state_dict(state, assign=assign)
        assert all(torch.equal(*pair) for pair in zip(target.parameters(), source.parameters(), strict=True))
        assert all(parameter.is_contiguous() for parameter in target.parameters())


def test_a_file_of_version_1_loads(tmp_path):
    """Its values lay in the memory order (a, d, b, c)."""
    layer = KSLinear(24, 36, rank=3, bias=True)
    payload = layer.to_payload()
    assert payload["version"] == 1
    for name, pattern in zip(("factors.0", "factors.1"), layer.patterns):
        a, b, c, d = pattern
        values = torch.empty(a, d, b, c).permute(0, 2, 3, 1).copy_(payload["state_dict"][name])
        payload["state_dict"][name] = values
    torch.save(payload, tmp_path / "chain.pth")
    x = torch.randn(5, 24)
    assert torch.equal(ks.load(tmp_path / "chain.pth")(x), layer(x))


def test_the_factors_are_views_of_the_parameters():
    layer = KSLinear(24, 36, rank=3)
    with torch.no_grad():
        layer.factors[0].fill_(2.0)
    assert (layer.block_0 == 2.0).all()
    assert [tuple(factor.shape) for factor in layer.factors] == list(layer.patterns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_answers_what_code_asks_and_computes_nothing(dtype):
    layer = KSLinear(24, 36, rank=3, dtype=dtype)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((36, 24), dtype, "cpu")
    assert torch.nn.functional.linear(torch.randn(5, 24, dtype=dtype), weight).isnan().all()
    x, y = torch.ones(5, 24, dtype=dtype), layer(torch.ones(5, 24, dtype=dtype))
    torch.nn.init.zeros_(weight)
    assert torch.equal(layer(x), y)
    assert layer.weight.isnan().all()
    layer.stored_transposed = True
    assert layer.weight.shape == (24, 36)
    assert "weight" not in layer.state_dict()


def test_values_that_are_written_next_are_not_drawn(tmp_path):
    layer = KSLinear(24, 36, rank=3, bias=True)
    layer.save(tmp_path / "chain.pth")
    before = torch.get_rng_state()
    ks.load(tmp_path / "chain.pth")
    KSLinear.from_dense(torch.ones(36, 24), 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("batch_last", [False, True])
def test_a_stack_of_chains_hands_its_features_over_in_blocks(batch_last):
    """An MLP of three grids with activations between them computes what the three dense weights do."""
    torch.manual_seed(0)
    sizes, options = (24, 36, 48, 16), {"rank": 100, "batch_last": batch_last}
    linears = [torch.nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    first = KSLinear.from_linear(linears[0], **options)
    layers = [first]
    for linear in linears[1:]:
        order = torch.arange(linear.in_features).view(-1, 4).t().flatten()
        layers.append(KSLinear.from_dense(linear.weight[:, order], bias=linear.bias, **options))
        assert torch.equal(layers[-2].leave_blocks_to(layers[-1]), order)
    stack = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1], torch.nn.Tanh(), layers[2])
    dense = torch.nn.Sequential(linears[0], torch.nn.GELU(), linears[1], torch.nn.Tanh(), linears[2])
    for x in (torch.randn(5, 24), torch.randn(2, 3, 24)):
        y = stack(x.movedim(-1, 0) if batch_last else x)
        torch.testing.assert_close(y.movedim(0, -1) if batch_last else y, dense(x), atol=1e-4, rtol=1e-4)
    between = layers[0](torch.randn(24, 5) if batch_last else torch.randn(5, 24))
    assert between.shape == ((4, 9, 5) if batch_last else (5, 4, 9))
    with pytest.raises(UsageError, match="the (first|last) 2 dimensions must be 4, 9"):
        layers[1](torch.randn(36, 5) if batch_last else torch.randn(5, 36))
    with pytest.raises(UsageError, match="saved by the state_dict"):
        layers[0].to_payload()


def test_blocks_that_do_not_fit_the_next_chain_are_refused():
    first = KSLinear(24, 36, rank=3)
    for consumer in (KSLinear(36, 8, chain="lowrank"), KSLinear(40, 8), KSLinear(36, 8, batch_last=True)):
        with pytest.raises(UsageError, match="cannot go to"):
            first.leave_blocks_to(consumer)
    assert first(torch.randn(5, 24)).shape == (5, 36)


def test_what_is_no_saved_chain_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        ks.load(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UsageError, match="cannot be read as a saved chain"):
        ks.load(tmp_path / "text.pth")
    torch.save(torch.randn(2, 2), tmp_path / "tensor.pth")
    with pytest.raises(UsageError, match="not a saved chain"):
        ks.load(tmp_path / "tensor.pth")
    torch.save(KSLinear(8, 8).to_payload() | {"version": 99}, tmp_path / "new.pth")
    with pytest.raises(UsageError, match="format version 99"):
        ks.load(tmp_path / "new.pth")


def test_bad_arguments():
    with pytest.raises(UsageError, match="need a CUDA device"):
        KSLinear(8, 8, impl="triton")
    with pytest.raises(UsageError, match="third argument of KSLinear is the rank; write bias=True"):
        KSLinear(8, 8, True)
    with pytest.raises(UsageError, match="meet 4 rows"):
        KSLinear.from_patterns([(1, 2, 6, 1), (1, 4, 2, 1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_dense_compresses_to_the_floor_in_the_weights_dtype(dtype):
    torch.manual_seed(0)
    weight = torch.randn(24, 36).to(dtype)
    layer = KSLinear.from_dense(weight, rank=3)
    assert layer.factors[0].dtype == dtype
    floor = loss_floor(weight, ks.make_chain(24, 36), [3])[0].lower
    assert population_loss(weight, layer.factors) == pytest.approx(floor, rel=10 * torch.finfo(dtype).eps)


def test_from_linear_keeps_bias_and_stands_in_for_the_layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 36)
    layer = KSLinear.from_linear(linear, rank=100)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-4)
    butterfly = KSLinear.from_linear(linear, rank=2, chain="butterfly")
    assert len(butterfly.factors) == 3
    with pytest.raises(UsageError, match="either a rank"):
        KSLinear.from_linear(linear)
    with pytest.raises(UsageError, match=r"Parameter: an nn\.Linear is needed"):
        KSLinear.from_linear(linear.weight, rank=2)


def test_from_linear_for_measured_inputs_keeps_the_bias_and_loses_less_of_their_energy():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 36)
    samples = torch.randn(200, 24) @ (torch.randn(24, 24) * torch.logspace(0, -2, 24)[:, None])
    moment = samples.double().t() @ samples.double() / 200
    inputs = SecondMoment(moment)
    (floor,) = loss_floor(linear.weight, ks.make_chain(36, 24), [2], inputs)
    losses = {}
    for given in (moment, inputs, None):
        layer = KSLinear.from_linear(linear, rank=2, metric=given)
        torch.testing.assert_close(layer.bias, linear.bias)
        with torch.no_grad():
            losses[given] = (layer(samples) - linear(samples)).square().mean().item()
    assert losses[moment] == losses[inputs] == pytest.approx(floor.upper, rel=1e-4)
    assert losses[inputs] < 0.9 * losses[None]
    with pytest.raises(UsageError, match="second moment of 36 features"):
        KSLinear.from_dense(linear.weight, rank=2, metric=torch.eye(36))
