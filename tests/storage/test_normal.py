"""Text is normalised in linear time, and real text as Unicode has it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.domain import Role
from storage import identity, words
from storage.normal import normal

MARKS = "\u0301\u0327\u0316\u0344\u3099\uff9e\U0001d165"


@given(st.text(max_size=60), st.sampled_from(["NFC", "NFKC"]))
def test_text_with_few_marks_is_what_unicode_says(text, form):
    assert normal(form, text) == unicodedata.normalize(form, text)


@given(st.text("ae" + MARKS, max_size=200), st.sampled_from(["NFC", "NFKC"]))
def test_marks_are_bounded_and_normal_forms_stay(text, form):
    once = normal(form, text)
    assert unicodedata.is_normalized(form, once)
    runs = "".join("m" if unicodedata.combining(sign) else " " for sign in unicodedata.normalize("NFKD", once)).split()
    assert max(map(len, runs), default=0) <= 2 * 30 + 2  # U+0344 stands for two


@pytest.mark.parametrize("marks", ["\u0301\u0327", "\uff9e\u0301", "\U0001d165\u0316"])
def test_of_thousands_of_marks_over_a_letter_few_count(marks):
    """All of them, put in order, took seconds."""
    text = f"a{marks * 32_000}"
    assert len(words.indexed(text)) < 200
    assert identity.digest(Role.USER, text) == identity.digest(Role.USER, text[:10_000])


def test_text_of_another_script_is_left_as_it_is():
    text = "\u30ac\u30ae\u30b0" * 200 + "\u0915\u093f\u0924\u093e\u092c " * 50
    assert normal("NFC", text) == unicodedata.normalize("NFC", text)
