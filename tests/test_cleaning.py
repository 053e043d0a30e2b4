import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cleaning import RULES, clean, left_out


@pytest.mark.parametrize(
    "text,cleaned,rules",
    [
        ("Déjà vu.\r\n\tOui\n", "Déjà vu.\r\n\tOui\n", ()),
        ("e\u0301te\u0301", "été", ("nfc",)),
        ("a\x00b\x1bc\x7fd\x9fe", "abcde", ("control",)),
        ("one\ftwo\vthree\x85four", "one\ntwo\nthree\nfour", ("control",)),
        ("\ud83d\ude42 \ud83d", "🙂 \ufffd", ("surrogates",)),
        ("e\x00\u0301\udc00", "é\ufffd", RULES),  # composed once nothing is between
        ("", "", ()),
        ("\u00a0\u2028\u200d\ufeff", "\u00a0\u2028\u200d\ufeff", ()),
    ],
)
def test_each_rule(text, cleaned, rules):
    assert clean(text) == (cleaned, rules)


ANY = st.text(st.characters() | st.sampled_from("\x00\n\t\u0301e\ud83d\ude42\x85"))


@given(ANY)
def test_any_text_comes_out_clean_and_stays_so(text):
    cleaned, rules = clean(text)
    cleaned.encode()  # raises for a surrogate
    assert unicodedata.is_normalized("NFC", cleaned)
    assert {c for c in cleaned if unicodedata.category(c) == "Cc"} <= set("\t\n\r")
    assert clean(cleaned) == (cleaned, ())
    assert bool(rules) == (cleaned != text)
    # Nothing but what the rules name is lost.
    kept = re.sub("[\ud800-\udfff]", "", text)
    ends = str.maketrans({c: "\n" for c in "\v\f\x85"})
    kept = "".join(
        c for c in kept.translate(ends) if c in "\t\n\r" or unicodedata.category(c) != "Cc"
    )
    rest = cleaned if "surrogates" not in rules else None
    assert rest is None or rest == unicodedata.normalize("NFC", kept)


@pytest.mark.parametrize(
    "text,least,reason",
    [
        ("", 0, "empty"),
        (" \n\u00a0", 0, "empty"),
        (" \n ", 9, "empty"),
        ("abc", 4, "short"),
        ("abcd", 4, ""),
        ("a", 0, ""),
    ],
)
def test_what_is_left_out(text, least, reason):
    assert left_out(text, least) == reason
