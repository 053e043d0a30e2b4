import re
import unicodedata

import pytest
from text_cases import code_points

from data import unicode_tables

tokenizers = pytest.importorskip("tokenizers")
NFC = tokenizers.normalizers.NFC()


def same_nfc(texts):
    joined = "\n".join(texts)  # a line break composes with nothing
    if NFC.normalize_str(joined) != unicode_tables.nfc(joined):
        for text in texts:
            assert NFC.normalize_str(text) == unicode_tables.nfc(text), ascii(text)


@pytest.fixture(params=["unicodedata", "unicodedata2"])
def version(request, monkeypatch):
    """Python's own Unicode, and a newer one, which only the slow tests have."""
    module = pytest.importorskip(request.param)
    if not hasattr(module, "is_normalized"):
        monkeypatch.setattr(
            module, "is_normalized", lambda form, text: module.normalize(form, text) == text, False
        )
    monkeypatch.setattr(unicode_tables, "unicodedata", module)
    return module


def test_word_characters_are_those_of_the_library():
    everything = "".join(code_points())
    theirs = tokenizers.normalizers.Replace(tokenizers.Regex(r"[ \w]"), "")
    ours = re.compile(f"[ {unicode_tables.WORD}]")
    assert ours.sub("", everything) == theirs.normalize_str(everything)


@pytest.mark.slow
def test_every_character_composes_as_in_the_library(version):
    # Between marks of the highest class and the lowest: whatever has a class moves.
    # (U+0345 is of class 240, U+0334 of class 1.)
    same_nfc(list(map("a\u0345{}\u0334\u0301".format, code_points())))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}", "\u1100{}\u1161\u11a8\u0334"])
def test_every_character_composes_alone_and_in_hangul(version, form):
    same_nfc(list(map(form.format, code_points())))


@pytest.mark.slow
def test_every_pair_composes_as_in_the_library(version):
    """Of all characters that can compose or move, in the newest Unicode at hand."""
    newest = pytest.importorskip("unicodedata2") if version is not unicodedata else version
    parts = {c: newest.decomposition(c).split() for c in code_points()}
    parts = {c: p for c, p in parts.items() if p and not p[0].startswith("<")}
    ideographs = {c for c in parts if len(parts[c]) == 1}
    firsts = {chr(int(p[0], 16)) for c, p in parts.items() if c not in ideographs}
    seconds = {chr(int(p[-1], 16)) for c, p in parts.items() if c not in ideographs}
    seconds |= {c for c in code_points() if newest.combining(c)}
    for a in sorted(firsts | seconds | parts.keys() - ideographs):
        same_nfc([f"{a}{b}\u0301" for b in sorted(seconds)])


def test_a_class_is_written_as_ranges():
    assert unicode_tables.regex_class("30-39 5F 5D") == r"0-9_\]"
