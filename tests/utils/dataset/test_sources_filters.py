"""Filter expressions: what they mean, against Python itself, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.dataset.sources.filters import Filter
from utils.dataset.sources.locators import Fault, SourceProblem

ROW = {"width": 640, "height": "480", "score": 5.5, "style": "Photo", "tags": ["cat", "dog"], "note": None, "empty": ""}


@pytest.mark.parametrize(
    "text, holds",
    [
        ("width >= 512 and score > 5", True),
        ("width >= 512 and not score > 5", False),
        ("512 < width < 641", True),
        ("width / height < 1.4", True),
        ("width * -1 + 640 == 0 - 0", True),
        ("height == 480", True),
        ("height == '480'", True),
        ("height != 480", False),
        ("style == 'photo' or lower(style) == 'photo'", True),
        ("style in ('Photo', 'Drawing')", True),
        ("style not in ['Photo']", False),
        ("'hot' in style", True),
        ("'cat' in tags and 'bird' not in tags", True),
        ("width in (1, 640)", True),
        ("height in (1, 480)", True),
        ("len(tags) == 2 and len(note) == 0", True),
        ("style == 3", False),
        ("style != 3", True),
        ("note > 3 or note < 3 or note + 1 == 1 or note == 3", False),
        ("note != 3", True),
        ("empty > 3 or empty <= 3 or empty * 2 == 0", False),
        ("lower(note) == ''", True),
        ("width > 3\n  and True", True),
    ],
)
def test_expressions(text, holds):
    assert Filter(text, ROW.keys()).holds(ROW) is holds


NUMBERS = st.integers(-3, 3).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS | st.sampled_from(["a", "b"]),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
    max_leaves=6,
)
TESTS = st.recursive(
    st.builds("{} {} {}".format, EXPRESSIONS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), EXPRESSIONS),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or", "and not"]), inner),
    max_leaves=4,
)


@given(TESTS, st.integers(-3, 3), st.floats(-2, 2))
def test_numbers_are_as_in_python(text, a, b):
    row = {"a": a, "b": b}
    try:
        expected = bool(eval(text, {}, row))
    except ArithmeticError:
        with pytest.raises(Fault):
            Filter(text, row).holds(row)
    else:
        assert Filter(text, row).holds(row) is expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("widht > 3", "no column widht; did you mean width?"),
        ("qqq > 3", "there are"),
        ("width >", "cannot be understood"),
        ("width = 3", "cannot be understood"),
        ("__import__('os')", "cannot be used"),
        ("style.upper() == 'X'", "cannot be used"),
        ("len(tags, 3)", "cannot be used"),
        ("9 ** 9 ** 9", "cannot be used"),
        ("tags[0] == 'cat'", "cannot be used"),
        ("[x for x in tags]", "cannot be used"),
        ("(lambda: 1)()", "cannot be used"),
        ("f'{width}' == ''", "cannot be used"),
        ("note is None", "cannot be used"),
        ("note == None", "cannot be used"),
        ("~width == 3", "cannot be used"),
        ("width > 3 #\0", "cannot be understood"),
        ("(" * 900 + "1" + ")" * 900, "cannot be understood"),
        ("1+" * 990 + "1 +" + " " * 20 + "1", "more than"),
        ("not " * 450 + "width", ""),
    ],
)
def test_refused(text, words):
    if not words:
        Filter(text, ROW.keys()).holds(ROW)
        return
    with pytest.raises(SourceProblem, match="filter = ") as error:
        Filter(text, ROW.keys())
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["style > 3", "'a' * width == ''", "width / 0 > 1", "lower(width) == ''", "tags < 3"])
def test_rows_that_it_cannot_say_anything_of(text):
    with pytest.raises(Fault, match="cannot be worked out") as error:
        Filter(text, ROW.keys()).holds(ROW)
    assert error.value.kind == "broken row"
