import pytest

from ks.errors import UsageError
from ks.files.globs import find_weight, is_glob, matching, nearest

NAMES = [
    "encoder.layer.0.output.dense",
    "encoder.layer.11.output.dense",
    "encoder.layer.0.attention.output.dense",
    "head",
]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("encoder.layer.*.output.dense", NAMES[:2]),
        ("encoder.layer.1*.output.dense", NAMES[1:2]),
        ("**.output.dense", NAMES[:3]),
        ("**.attention.**", NAMES[2:3]),
        ("**", NAMES),
        ("head.**", NAMES[3:]),
        ("*", NAMES[3:]),
        ("encoder.layer", []),
        ("Head", []),
        ("encoder.layer.0Xoutput.dense", []),
        ("", []),
        (["head", "encoder.layer.0.*.dense"], [NAMES[0], NAMES[3]]),
    ],
)
def test_a_star_is_one_component_and_two_are_any_number(glob, found):
    assert matching(NAMES, glob) == found


def test_the_nearest_names_are_listed_in_one_line():
    assert nearest("encoder.layer.0.output", NAMES).startswith(f"nearest of 4: {NAMES[0]}, ")
    assert nearest("a", []) == "it holds none"
    assert "\n" not in nearest("a", ["a\nb"])


ALIASES = dict.fromkeys(
    ["encoder.layer.0.output.dense.weight", "decoder.layer.0.output.dense.weight", "bert.pooler.dense.weight"], "x"
)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("encoder.layer.0.output.dense", "encoder.layer.0.output.dense.weight"),
        ("bert.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("model.bert.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight"),
        ("pooler.dense.weight", "bert.pooler.dense.weight"),
    ],
)
def test_keys_of_a_checkpoint_may_differ_by_a_prefix(key, found):
    assert find_weight(ALIASES, key, "m") == found


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("a.b.c.d.encoder.layer.0.output.dense.weight", "m: no inputs for key"),
        ("xencoder.layer.0.output.dense.weight", "no inputs for key"),
        ("layer.0.output.dense.weight", r"fits encoder\.layer.*, decoder\.layer.*; give one of them in full"),
        ("encoder.layer.0.output.dense.bias", r"nearest of 3: encoder\.layer\.0\.output\.dense\.weight"),
        ("weight", "no inputs for key"),  # the name of a lone layer is no prefix of all
        ("dense.weight\nx", r"'dense\.weight x'"),
    ],
)
def test_a_key_that_fits_none_or_several_is_refused(key, message):
    with pytest.raises(UsageError, match=message):
        find_weight(ALIASES, key, "m")


def test_a_name_with_brackets_matches_itself():
    names = ["blocks[0].weight", "blocks0.weight"]
    assert matching(names, "blocks[0].weight") == names
    assert not is_glob("blocks[0].weight")
    assert is_glob("blocks.[01].weight")
