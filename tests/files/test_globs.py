import pytest

from ks.files.globs import matches, matching, nearest

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
        ("encoder.layer.0.output.dense", NAMES[:1]),
        ("encoder.layer.1*.output.dense", NAMES[1:2]),
        ("encoder.**.output.dense", NAMES[:3]),
        ("**.output.dense", NAMES[:3]),
        ("encoder.**", NAMES[:3]),
        ("**.attention.**", NAMES[2:3]),
        ("**", NAMES),
        ("**.head", NAMES[3:]),
        ("head.**", NAMES[3:]),
        ("*", NAMES[3:]),
        ("*.*", []),
        ("encoder.layer", []),
        ("output.dense", []),
        ("Head", []),
        ("", []),
        (["head", "encoder.layer.0.*.dense"], [NAMES[0], NAMES[3]]),
    ],
)
def test_a_star_is_one_component_and_two_are_any_number(glob, found):
    assert matching(NAMES, glob) == found


def test_dots_of_a_glob_are_no_wildcards():
    assert not matches("aXb", "a.b")
    assert not matches("a.b", "a*b")


def test_the_nearest_names_are_named_in_one_line():
    assert nearest("encoder.layer.0.output", NAMES).startswith(f"nearest of 4: {NAMES[0]}, ")
    assert nearest("a", []) == "it holds none"
    assert "\n" not in nearest("a", ["a\nb"])
