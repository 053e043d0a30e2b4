"""What is done to a text before it is tokenised, each rule by its name.

surrogates  Halves of UTF-16 pairs, as JSON may write them, become their character; single ones
            U+FFFD.
control     Control characters go, but for tab and line ends. Those that end a line or a page
            (vertical tab, form feed, next line) become a line feed.
nfc         Unicode's composed form, which the tokenizer itself asks for.

Then a text of white space alone is left out (empty), as is one under a number of characters
(short). Filtering the web, by language, quality or likeness, is another trade: see Hugging Face's
datatrove.
"""

import re
import unicodedata

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# The same in UTF-8, one byte or two: to look for these takes a third of the time.
CONTROL_BYTES = bytes(b for b in range(128) if CONTROL.match(chr(b)))
CONTROL_PAIRS = re.compile(b"\xc2[\x80-\x9f]")
LINE_ENDS = {"\v": "\n", "\f": "\n", "\x85": "\n"}
RULES = ("surrogates", "control", "nfc")


def clean(text: str) -> tuple[str, tuple[str, ...]]:
    """The text cleaned, and the names of the RULES that changed it."""
    changed = []
    try:
        # The cheapest test for a surrogate: only they cannot be written.
        data = text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        changed.append("surrogates")
        data = text.encode()
    if len(data.translate(None, CONTROL_BYTES)) < len(data) or CONTROL_PAIRS.search(data):
        text = CONTROL.sub(lambda found: LINE_ENDS.get(found[0], ""), text)
        changed.append("control")
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        changed.append("nfc")
    return text, tuple(changed)


def left_out(text: str, min_characters: int) -> str:
    """Why a cleaned text is no document: "empty", "short", or "" for one that is."""
    if not text.strip():
        return "empty"
    return "short" if len(text) < min_characters else ""
