"""The inputs of one weight from moments or raw samples, and the checks of them."""

import warnings

import numpy as np
import pytest
import torch
from conftest import refusal
from networks import hand_computed, normal
from safetensors.torch import save_file

from ks.moments.moments_file import InputMoments
from ks.moments.read import inputs_of, packed_inputs, read_input_moments
from ks.moments.second_moment import VectorSums

WIDTH = 6
KEY = "encoder.layer.0.output.dense.weight"
ROWS, UNSEEN = normal(100, WIDTH), normal(30, WIDTH, seed=1)


@pytest.fixture(autouse=True)
def no_warning():
    """A warning would be further lines on stderr."""
    with warnings.catch_warnings(action="error"):
        yield


def saved(path, train=None, held_out=None, name="x", **changed):
    """A moments file with one input tensor."""
    aliases = {KEY: name, KEY.replace("output", "other"): name}
    fields = {"aliases": aliases, "batches": {name: 5}, "transposed": (), "model": "MiniLM"} | changed
    parts = {name: VectorSums.of(ROWS) if train is None else train}, {name: held_out} if held_out is not None else {}
    InputMoments(*parts, **fields).save(path)
    return path


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "m.safetensors", held_out=VectorSums.of(UNSEEN))


def is_moments_of(part, rows):
    square, total = hand_computed(rows)
    torch.testing.assert_close(part.second_moment, square / len(rows), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.mean, total / len(rows), rtol=1e-12, atol=1e-12)
    assert part.count == len(rows)
    assert part.second_moment.dtype == part.mean.dtype == torch.float64
    assert torch.equal(part.second_moment, part.second_moment.t())


def refused(path, message, width=WIDTH, key=KEY, **options):
    with refusal(message) as raised:
        read_input_moments(path, width, key, **options)
    assert str(path) in str(raised.value)


def test_a_moments_file_gives_both_parts(path):
    found = read_input_moments(path, WIDTH, KEY)
    is_moments_of(found.train, ROWS)
    is_moments_of(found.held_out, UNSEEN)
    assert found.key == KEY
    assert found.samples is None
    assert found.transposed is False
    assert found.notes == ()
    assert len(found.sha256) == 64


def test_the_key_of_the_weight_is_the_default_and_a_lone_weight_needs_none(tmp_path, path):
    assert read_input_moments(path, WIDTH, weight_key=KEY).key == KEY
    assert read_input_moments(path, WIDTH, KEY, weight_key="another").key == KEY
    refused(path, "holds the inputs of 2 weights; give a key, nearest of 2", key=None)
    one = saved(tmp_path / "one.safetensors", aliases={KEY: "x"})
    assert read_input_moments(one, WIDTH).key == KEY


def test_a_note_reports_a_key_that_is_found_behind_a_prefix_and_a_missing_key_has_its_nearest(path):
    [note] = read_input_moments(path, WIDTH, f"bert.{KEY}").notes
    assert note == f"inputs of bert.{KEY}: found in {path} as {KEY}"
    refused(path, f"no inputs for key '{KEY}s'; nearest of 2: {KEY}", key=f"{KEY}s")


def test_no_held_out_part_is_none(tmp_path):
    assert read_input_moments(saved(tmp_path / "m.safetensors"), WIDTH, KEY).held_out is None
    empty = saved(tmp_path / "empty.safetensors", held_out=VectorSums.zeros(WIDTH))
    assert read_input_moments(empty, WIDTH, KEY).held_out is None


def test_another_width_is_refused_with_the_reason(tmp_path, path):
    refused(path, "inputs 'x' are 6 wide, and the weight takes 5 inputs; choose their key", 5)
    path = saved(tmp_path / "m.safetensors", transposed=(KEY,))
    assert read_input_moments(path, WIDTH, KEY).transposed is True
    refused(
        path, "are 6 wide, and the weight takes 9 inputs; its model stores this weight as .in, out., so transpose", 9
    )


def changed(**fields):
    found = VectorSums.of(ROWS)
    for name, change in fields.items():
        setattr(found, name, change(getattr(found, name)))
    return found


def skewed(matrix):
    matrix = matrix.clone()
    matrix[0, 1] += 1e-3 * matrix.norm()
    return matrix


# Sums that real inputs cannot have, and the message.
FAULTS = {
    "not symmetric": (changed(sum_xx=skewed), "sum_xx is not symmetric"),
    "negative diagonal": (changed(sum_xx=lambda square: square - 200 * torch.eye(WIDTH)), "not positive semi-definite"),
    "mean of others": (changed(sum_x=lambda total: total + 150), "sum_x does not belong to sum_xx"),
    "count of others": (
        changed(count=lambda count: 1, sum_x=lambda total: total + 30),
        "sum_x does not belong to sum_xx",
    ),
    "overflow": (changed(sum_xx=lambda square: square * 1e300), "the second moment overflows"),
    "count 0": (changed(count=lambda count: 0), "count is 0"),
    "all zero": (VectorSums(torch.zeros(WIDTH, WIDTH).double(), torch.zeros(WIDTH).double(), 9), "all inputs are zero"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_sums_that_real_inputs_cannot_have_are_refused(tmp_path, case):
    refused(saved(tmp_path / "m.safetensors", FAULTS[case][0]), FAULTS[case][1])


def test_the_held_out_part_is_checked_too(tmp_path):
    sums_of_others, message = FAULTS["mean of others"]
    refused(saved(tmp_path / "other.safetensors", held_out=sums_of_others), f"held out: {message}")
    refused(
        saved(tmp_path / "m.safetensors", held_out=VectorSums.of(normal(9, 5))), "the held-out part is 5 wide, not 6"
    )


def with_gradients(path, gradients, unseen=None, **changed):
    parts = {"gradients": {KEY: gradients}} | ({"held_out_gradients": {KEY: unseen}} if unseen else {})
    return saved(path, loss="next token", unit="nats", **parts | changed)


def test_gradients_are_read_with_the_inputs(tmp_path):
    outputs = normal(90, 3), normal(20, 3, seed=1)
    path = with_gradients(
        tmp_path / "m.safetensors", VectorSums.of(outputs[0]), VectorSums.of(outputs[1]), held_out=VectorSums.of(UNSEEN)
    )
    found = read_input_moments(path, WIDTH, KEY)
    is_moments_of(found.gradients, outputs[0])
    is_moments_of(found.held_out_gradients, outputs[1])
    assert found.unit == "nats"
    other = read_input_moments(path, WIDTH, KEY.replace("output", "other"))
    assert other.gradients is None is other.gradients_sha256
    again = with_gradients(tmp_path / "again.safetensors", VectorSums.of(outputs[0] + 1), VectorSums.of(outputs[1]))
    assert read_input_moments(again, WIDTH, KEY).gradients_sha256 not in (None, found.gradients_sha256)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("all zero", "all gradients are zero, so that the loss does not depend on the outputs; choose another layer"),
        ("overflow", "the second moment overflows; scale the gradients down"),
        ("not symmetric", "sum_xx is not symmetric"),
        ("mean of others", "sum_x does not belong to sum_xx"),
    ],
)
def test_sums_that_real_gradients_cannot_have_are_refused_by_name(tmp_path, case, message):
    refused(with_gradients(tmp_path / "m.safetensors", FAULTS[case][0]), f"gradients of '{KEY}': {message}")
    held_out = with_gradients(tmp_path / "other.safetensors", VectorSums.of(ROWS), FAULTS[case][0])
    refused(held_out, f"gradients of '{KEY}', held out: {message}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_fault(tmp_path, dtype):
    """Sums in float32 over inputs of rank 2: eigenvalues that are zero are rounded to both sides of it."""
    rows = (normal(5000, 2) @ normal(2, 40, seed=1)).to(dtype)
    square = rows.t() @ rows
    found = VectorSums(square.double(), rows.double().sum(0), len(rows))
    read = read_input_moments(saved(tmp_path / "m.safetensors", found), 40, KEY)
    assert torch.linalg.eigvalsh(read.train.second_moment)[0] < 1e-9
    torch.testing.assert_close(read.train.second_moment, square.double() / 5000, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "remark"),
    [(60, None), (59, "59 samples for 6 features: floors"), (5, "singular, so floors")],
)
def test_few_inputs_are_remarked(tmp_path, count, remark):
    notes = read_input_moments(saved(tmp_path / "m.safetensors", VectorSums.of(ROWS[:count])), WIDTH, KEY).notes
    assert len(notes) == (remark is not None)
    if remark:
        assert remark in notes[0]
        assert "Collect at least 60." in notes[0]


def write_samples(path, rows, key=None):
    if path.suffix == ".npy":
        np.save(path, rows.numpy())
    elif path.suffix == ".safetensors":
        save_file({key or "x": rows.contiguous()}, path)
    else:
        torch.save(rows if key is None else {key: rows}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_the_last_rows_of_samples_are_held_out(tmp_path, suffix):
    found = read_input_moments(write_samples(tmp_path / f"x{suffix}", ROWS), WIDTH, val_split=0.3)
    is_moments_of(found.train, ROWS[:70])
    is_moments_of(found.held_out, ROWS[70:])
    assert torch.equal(found.samples, ROWS)
    assert found.key == ("x" if suffix == ".safetensors" else None)
    assert found.transposed is None
    assert found.notes == ()


def test_samples_without_a_held_out_part_or_without_another_one(tmp_path):
    found = read_input_moments(write_samples(tmp_path / "x.npy", ROWS), WIDTH, val_split=0.001)
    assert found.held_out is None
    is_moments_of(found.train, ROWS)
    refused(write_samples(tmp_path / "one.npy", ROWS[:1]), "leaves none; give more", key=None, val_split=0.8)


def test_the_key_of_samples(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": ROWS, "b": ROWS + 1, KEY: ROWS + 2}, path)
    for options, number in (({"key": "b"}, 1), ({"weight_key": KEY}, 2), ({"key": "a", "weight_key": KEY}, 0)):
        assert torch.equal(read_input_moments(path, WIDTH, **options).samples, ROWS + number)
    refused(path, "holds 3 tensors; give the key of the samples, nearest of 3: a, b", key=None)
    refused(path, "has no key 'c'; nearest of 3", key="c")
    alone = write_samples(tmp_path / "alone.pt", ROWS, "acts")
    assert read_input_moments(alone, WIDTH, weight_key=KEY).notes == (f"samples of {alone}: its only tensor, acts",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (normal(20, 5), "samples of width 5, and the weight takes 6 inputs"),
        (normal(4, 5, 6), r"has shape \(4, 5, 6\); samples \(N, 6\) are needed \(x.reshape\(-1, 6\)\)"),
        (torch.ones(0, 6), r"has shape \(0, 6\)"),
        (torch.ones(9, 6, dtype=torch.int64), "has dtype int64"),
        (ROWS / 0, "NaN or infinite"),
        (ROWS.to_sparse(), "is sparse"),
    ],
)
def test_tensors_that_are_no_samples_are_refused(tmp_path, rows, message):
    with warnings.catch_warnings(action="ignore"):
        torch.save(rows, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", message, key=None)


@pytest.mark.parametrize("key", [KEY, f"bert.{KEY}", KEY.replace("output", "other")])
def test_packed_inputs_are_those_of_one_weight(tmp_path, key):
    path = tmp_path / "m.safetensors"
    parts = {"x": VectorSums.of(ROWS), "y": VectorSums.of(normal(9, 4))}, {"x": VectorSums.of(UNSEEN)}
    aliases = {KEY: "x", KEY.replace("output", "other"): "x", "y.weight": "y"}
    InputMoments(*parts, aliases, {"x": 5, "y": 5}, (KEY, "y.weight"), "MiniLM").save(path)
    (tmp_path / "alone.safetensors").write_bytes(packed_inputs(path, key))
    first, again = (read_input_moments(tmp_path / name, WIDTH, key) for name in ("m.safetensors", "alone.safetensors"))
    assert (again.sha256, again.transposed, again.key) == (first.sha256, first.transposed, first.key)
    assert list(InputMoments.load(tmp_path / "alone.safetensors").train) == ["x"]
    assert InputMoments.load(tmp_path / "alone.safetensors").batches == {"x": 5}
    samples = write_samples(tmp_path / "x.npy", ROWS)
    assert packed_inputs(samples, None) == samples.read_bytes()


def test_the_hash_is_that_of_the_values(tmp_path, path):
    first = read_input_moments(path, WIDTH, KEY).sha256
    again = saved(tmp_path / "again.safetensors", held_out=VectorSums.of(UNSEEN), name="other", model="GPT")
    assert read_input_moments(again, WIDTH, KEY).sha256 == first
    for number, other in enumerate(
        ({}, {"held_out": VectorSums.of(ROWS)}, {"train": VectorSums.of(UNSEEN), "held_out": VectorSums.of(UNSEEN)})
    ):
        assert read_input_moments(saved(tmp_path / f"{number}.safetensors", **other), WIDTH, KEY).sha256 != first
    samples = [write_samples(tmp_path / f"x{suffix}", ROWS) for suffix in (".npy", ".safetensors")]
    one, two = (read_input_moments(path, WIDTH).sha256 for path in samples)
    assert one == two != read_input_moments(write_samples(tmp_path / "y.npy", ROWS + 1), WIDTH).sha256


def test_moments_in_memory_are_read_as_those_of_a_file(path):
    moments = InputMoments.load(path)
    given, read = inputs_of(moments, WIDTH, KEY), read_input_moments(path, WIDTH, KEY)
    assert (given.sha256, given.key) == (read.sha256, read.key)
    torch.testing.assert_close(given.train.second_moment, read.train.second_moment, rtol=0, atol=0)
    torch.testing.assert_close(given.held_out.second_moment, read.held_out.second_moment, rtol=0, atol=0)
