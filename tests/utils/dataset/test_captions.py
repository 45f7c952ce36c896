"""Captions as they are trained: tags moved, kept and left out; words added; weights."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.dataset.captions import VERSIONS_IN_ORDER, caption_variant, caption_variants, weighted, without_weights
from utils.settings.dataset_schema import DirectorySettings

TAG = st.text("abcxyzäß 猫", min_size=1).map(str.strip).filter(bool)
TAGS = st.lists(TAG, min_size=1, max_size=8)


def rules(**keys):
    return DirectorySettings(path=Path("pictures"), **keys)


def variant(caption, index=0, identity="one", **keys):
    return caption_variant(caption, rules(**keys), 0, identity, index)


def test_a_caption_is_left_as_written():
    written = "A dog,in  a park. ,"
    assert caption_variants([written], rules(), 0, "one") == (written,)


@given(TAGS, st.integers(0, 9), st.integers(0, 50))
def test_shuffling_loses_no_tag_and_keeps_the_first(tags, keep, index):
    shuffled = variant(", ".join(tags), index, cache_shuffle_num=1, keep_tokens=keep).split(", ")
    assert Counter(shuffled) == Counter(tags)
    assert shuffled[:keep] == tags[:keep]


@given(TAGS, TAGS, TAGS, st.integers(0, 50))
def test_tags_around_the_separators_are_kept(before, free, behind, index):
    caption = "|||".join(map(", ".join, (before, free, behind)))
    keys = {"cache_shuffle_num": 3, "keep_tokens_separator": "|||", "keep_tokens": 1, "tag_dropout": 0.5}
    found = variant(caption, index, shuffle_capitalization=0.5, **keys).split(", ")
    assert found[: len(before)] == before and found[len(found) - len(behind) :] == behind
    # The capital of "ß" is "SS".
    all_tags = Counter(tag.upper() for tag in [*before, *free, *behind])
    assert not Counter(tag.upper() for tag in found) - all_tags


def readings(caption, **keys):
    return set(caption_variants([caption], rules(enable_wildcard=True, **keys), 0, "one"))


def test_each_version_has_one_of_the_choices():
    assert readings("a {red|green} box") == {"a red box", "a green box"}
    assert readings("{a|b|c|d|e|f|g|h}") == set("abcdefgh")
    assert readings("a {red|green {round|square}} box") == {"a red box", "a green round box", "a green square box"}
    assert readings("first line\n\n second") == {"first line", "second"}
    assert readings("{{a|b}} {c|d}") == {"{a|b} c", "{a|b} d"}
    assert readings("a{,b|c") == {"a{,b|c"} and readings("a {} {b}") == {"a  b"}
    # As many versions as tags have orders, of which each has its own choice.
    found = readings("{x|y}, a, b", cache_shuffle_num=8)
    assert {tag for text in found for tag in text.split(", ")} == {"x", "y", "a", "b"} and len(found) > 2
    assert caption_variants(["a {b|c}"], rules(), 0, "one") == ("a {b|c}",)


def test_choices_are_drawn_apart_and_go_on_without_end():
    found = Counter(variant("{a|b}{c|d}", index, enable_wildcard=True) for index in range(800))
    assert found.keys() == {"ac", "ad", "bc", "bd"} and min(found.values()) > 150
    for first in (0, 8, 80):
        block = [variant("{a|b}", index, enable_wildcard=True) for index in range(first, first + VERSIONS_IN_ORDER)]
        assert Counter(block) == {"a": 4, "b": 4}


def test_what_keep_tokens_is_known_to_do():
    written = "sks dog, red collar, grass"
    assert variant(written, keep_tokens=1) == written
    orders = {variant(written, index, cache_shuffle_num=1, keep_tokens=1) for index in range(30)}
    assert orders == {written, "sks dog, grass, red collar"}
    assert variant(written, 5, cache_shuffle_num=1, keep_tokens=9) == written
    # The separator has the say where it is in the caption, and is taken out also of those that are not shuffled.
    keys = {"keep_tokens_separator": "|||", "keep_tokens": 2}
    assert variant("sks dog ||| a, b", **keys) == "sks dog, a, b"
    orders = {variant("sks dog ||| a, b", index, cache_shuffle_num=1, **keys) for index in range(30)}
    assert orders == {"sks dog, a, b", "sks dog, b, a"}
    orders = {variant("x, y, a, b", index, cache_shuffle_num=1, **keys) for index in range(30)}
    assert orders == {"x, y, a, b", "x, y, b, a"}
    orders = {variant("x ||| a, b ||| c, d", index, cache_shuffle_num=1, **keys) for index in range(30)}
    assert orders == {"x, a, b, c, d", "x, b, a, c, d"}


def test_the_delimiter_needs_no_space_behind_it():
    assert variant("a,b ,, c", cache_shuffle_num=1, keep_tokens=3) == "a, b, c"
    assert variant("a b  c", cache_shuffle_num=1, keep_tokens=3, cache_shuffle_delimiter=" ") == "a b c"
    assert variant("a, b; c", cache_shuffle_num=1, keep_tokens=3, cache_shuffle_delimiter=";") == "a, b;c"


def test_versions_are_many_and_depend_on_the_sample_alone():
    keys = rules(cache_shuffle_num=6, tag_dropout=0.2, shuffle_capitalization=0.2)
    captions = ["a, b, c, d, e, f, g", "one, two, three, four"]
    versions = caption_variants(captions, keys, 0, "one")
    assert len(versions) == 12 and versions == caption_variants(captions, keys, 0, "one")
    assert versions[6:] == caption_variants(captions[1:], keys, 0, "one")
    assert versions[2] == caption_variant(captions[0], keys, 0, "one", 2)
    assert versions != caption_variants(captions, keys, 0, "two")
    assert versions != caption_variants(captions, keys, 1, "one")
    assert caption_variants(["a, b"], rules(cache_shuffle_num=20), 0, "one") in (("a, b", "b, a"), ("b, a", "a, b"))


def test_first_and_all_captions():
    assert caption_variants(["a", "b", "a"], rules(), 0, "one") == ("a", "b")
    assert caption_variants(["b", "a"], rules(multiple_captions="first"), 0, "one") == ("b",)


def test_dropout_leaves_out_its_share_in_the_written_order():
    tags = [f"tag{number}" for number in range(50)]
    found = [variant(", ".join(tags), index, tag_dropout=0.3, keep_tokens=2).split(", ") for index in range(100)]
    assert all(one == sorted(one, key=tags.index) and one[:2] == tags[:2] for one in found)
    assert sum(map(len, found)) == pytest.approx(100 * (2 + 0.7 * 48), rel=0.03)
    assert len(caption_variants([", ".join(tags)], rules(tag_dropout=0.3), 0, "one")) == VERSIONS_IN_ORDER


def test_capitals_come_in_four_kinds():
    found = {variant("kept One, don't Stop", index, shuffle_capitalization=0.9, keep_tokens=1) for index in range(99)}
    changed = {"don't stop", "Don't stop", "Don't Stop", "DON'T STOP", "don't Stop"}
    assert found == {f"kept One, {tag}" for tag in changed}


def test_words_that_are_added():
    keys = {"trigger_word": "sks", "caption_prefix": "photo of ", "caption_suffix": "."}
    assert variant("a dog", **keys) == "photo of sks, a dog."
    assert variant("a sks dog", **keys) == "photo of a sks dog."
    assert variant("risks", **keys) == "photo of sks, risks."
    assert variant("", **keys) == "photo of sks."
    assert variant("一只猫", trigger_word="猫") == "一只猫"
    for index in range(50):
        found = variant("sks dog, a, b", index, tag_dropout=0.5, shuffle_capitalization=0.5, trigger_word="sks")
        assert found.startswith("sks dog")


def test_tags_with_weights_are_not_torn_apart():
    written = r"(red, round:1.3), [a, (b, c)], :\(, d"
    tags = ["(red, round:1.3)", "[a, (b, c)]", r":\(", "d"]
    for index in range(9):
        found = variant(written, index, cache_shuffle_num=1, weighted_tags=True)
        assert all(tag in found for tag in tags) and len(found) == len(written)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat) here", [("a ", 1.0), ("cat", 1.1), (" here", 1.0)]),
        ("((cat))", [("cat", 1.21)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(cat:-1)", [("cat", -1.0)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("[(cat:2)]", [("cat", 2 / 1.1)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        (r"smile :\) \(real\)", [("smile :) (real)", 1.0)]),
        (r"(a\\:2)\n", [("a\\", 2.0), (r"\n", 1.0)]),
        ("ratio 3:4 (a:b)", [("ratio 3:4 ", 1.0), ("a:b", 1.1)]),
        ("a) b] c:1.3)", [("a) b] c:1.3)", 1.0)]),
        ("a (b", [("a ", 1.0), ("b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        (f"(a:{'9' * 400})", [(f"a:{'9' * 400}", 1.1)]),
    ],
)
def test_weights_as_documented(text, pieces):
    assert weighted(text) == [(piece, pytest.approx(weight)) for piece, weight in pieces]
    assert without_weights(text) == "".join(piece for piece, _ in pieces)


def printed(pieces):
    """Pieces in the syntax that `weighted` reads."""

    def escaped(text):
        return "".join("\\" + letter if letter in "\\()[]" else letter for letter in text)

    return "".join(escaped(text) if weight == 1 else f"({escaped(text)}:{weight})" for text, weight in pieces)


@given(st.lists(st.tuples(st.text(r"ab:.1,()[]\ ä", min_size=1), st.floats(-9, 9).map(lambda x: round(x, 3)))))
def test_what_is_printed_is_read_again(pieces):
    read = weighted(printed(pieces))
    letters = [(letter, weight) for text, weight in pieces for letter in text]
    assert [(letter, weight) for text, weight in read for letter in text] == letters
    assert all(text for text, _ in read) or read == [("", 1.0)]


@given(st.text(r"ab:.12()[]\ "))
def test_any_text_has_weights(text):
    assert without_weights(text) == "".join(piece for piece, _ in weighted(text)) and weighted(text)
    assert len(without_weights(text)) <= len(text)
