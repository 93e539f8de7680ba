from ks.files.columns import Column, Loss, Positive, Text
from ks.files.table import filled, table

NAME = Column("layer", Text, "name")
RANK = Column("rank", Positive, "rank", form="{:.0f}")
LOSS = Column("relative_loss", Loss, "loss", form="{:.1%}", legend="the fraction lost")
VERDICT = Column("verdict", Text, "verdict")


def test_texts_stand_on_the_left_numbers_on_the_right_and_missing_values_are_dashes():
    rows = [{"layer": "a", "rank": 2.0, "relative_loss": 0.5}, {"layer": "long", "rank": 16, "relative_loss": "~3%"}]
    rows.append({"layer": "none", "rank": float("nan")})
    assert table([NAME, RANK, LOSS, VERDICT], rows).splitlines() == [
        "           relative_",
        "layer rank      loss",
        "a        2     50.0%",
        "long    16       ~3%",
        "none     -         -",
        "relative_loss: the fraction lost.",
    ]


def test_the_last_text_wraps_and_further_columns_continue_below():
    marks = "between its bounds, larger than dense, calibration-limited"
    wide = [Column(f"column{number}", Loss, "number") for number in range(3)]
    row = {"layer": "layer", "verdict": marks} | {column.name: 0.123456789 for column in wide}
    lines = table([NAME, *wide, VERDICT], [row], width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert sum(line.startswith("layer") for line in lines) == 4  # two headers and two rows
    assert {*marks.split()} <= {*" ".join(lines).split()}


def test_a_sentence_that_continues_is_indented():
    assert filled(["one two three"], 9) == ["one two\n  three"]


def test_a_legend_stands_below_the_first_of_several_tables():
    explained = set()
    texts = [table([RANK, LOSS], [{"rank": 2, "relative_loss": 0.5}], explained=explained) for _ in range(2)]
    assert ["the fraction lost" in text for text in texts] == [True, False]
