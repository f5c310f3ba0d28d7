"""Texts as words in one spelling, so that the same request in another dress is the same: look-alike letters of other alphabets, marks on letters,
characters that show nothing, escapes, tags. Folds text of one alphabet one to one, so that no two ordinary words of it become one."""

from __future__ import annotations

import html
import re
import unicodedata
import urllib.parse

_OPERATOR = re.compile(r"(?<=\d)(\s*)([-+*/%^<>=×÷])(?=\s*\d)|(?<!\S)(-)(?=\d)")
_PRIVATE = 0xE000
_SPACELESS = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
"""Scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han."""
_MARKS = (
    (0x0300, 0x036F), (0x0483, 0x0489), (0x0591, 0x05BD), (0x05BF, 0x05C7), (0x064B, 0x065F), (0x0670, 0x0670), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE00, 0xFE0F), (0xFE20, 0xFE2F), (0xE0100, 0xE01EF),
)  # fmt: skip
"""Marks that change no letter into another where they stand: accents, strokes through, points, variation selectors. Vowel signs are none."""
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")
"""Letters by category that show nothing: Hangul fillers, the empty Braille cell."""
_ALIKE = {
    "авсԁеһіјкмнопрԛѕтуѵԝхԍ": "abcdehijkmhonpqstyvwxg",
    "αβγεζηικνορτυχωϲϳ": "abyeznikvoptuxwcj",
    "օսհոցյզ": "ouhngjq",
    "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢ": "abcdefghijklmnopqrstuvwyz",
    "ıȷɑɡɩøđħłŧðŋɓƈɗƒɠɦɨƙɱɲƥƭʋƴʐʂɾɛɔⱥƀƌɇɉꝁꝑꝗɍⱦʉƶɯ": "ijagiodhltdnbcdfghikmnptvyzsreoabdejkpqrtuzm",
    "ᎠᎡᎢᎥᎪᎫᎬᎳᎷᎻᏀᏃᏒᏔᏙᏚᏞᏟᏢᏦᏴ": "drtiajewmhgzrwvslcpkb",
    "ꓐꓑꓓꓔꓖꓗꓙꓚꓜꓝꓟꓠꓡꓢꓣꓦꓧꓪꓫꓬꓮꓰꓲꓳꓴ": "bpdtgkjczfmnlsrvhwxyaeiou",
}
"""Letters that look like Latin ones, in small letters (Cherokee and Lisu have capitals only), and the Latin ones in the same order."""
_CAPITALS = str.maketrans("ΗΝΥΧΡΜ", "HNYXPM")
"""Greek capitals that look otherwise than their small letters."""
_LETTER = r"A-Za-z\u00c0-\u024f"
_MIXED = re.compile(rf"\w*(?:[{_LETTER}][ΗΝΥΧΡΜ]|[ΗΝΥΧΡΜ][{_LETTER}])\w*")
_ENCODED = re.compile(r"(?<![\d%])(?:%[0-9A-Fa-f]{2})+")
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})|\\+[nrt]")
_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|body|br|center|code|del|div|em|font|h[1-6]|head|hr|html|i|img|ins|kbd|li|mark|ol|p|pre|q|s|samp|small|span|"
    r"strike|strong|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul|var|wbr)(?:(\s[^<>]*))?/?>",
    re.IGNORECASE,
)
_SIGNS = re.compile(r"(?<=[^\W_])[@$!|€]+(?=[^\W_])|(?<!\S)[@$€]+(?=[^\W\d_])|(?<=[^\W\d_])\$+(?!\S)")
_AS_LETTERS = str.maketrans("@$!|€", "asile")
_DIGITS = str.maketrans("0134578", "oieastb")


class _Table(dict):
    """Character -> what becomes of it, filled in as characters are met."""

    def __missing__(self, code: int) -> str | int | None:
        character = chr(code)
        kind = unicodedata.category(character)
        if character in "'’ʼ`´" or kind in ("Cf", "Cc", "Cs") and not character.isspace():
            found: str | int | None = None
        elif character in _BLANK:
            found = " "
        elif kind[0] == "M":
            found = code
        elif kind[0] in "LN":
            found = f" {character}" if spaceless(character) else code
        elif kind == "Co":
            found = f" {character} "
        else:
            found = " "
        self[code] = found
        return found


class _Unmarked(dict):
    """Character of a decomposed text in small letters -> Latin look-alike, itself, or nothing for a mark that may go."""

    def __init__(self) -> None:
        super().__init__({ord(one): other for alike, latin in _ALIKE.items() for one, other in zip(alike, latin, strict=True)})
        self.update({ord("æ"): "ae", ord("œ"): "oe"})
        for first in (0x1F150, 0x1F170, 0x1F1E6):  # letters in a disc, in a square, of flags
            self.update({first + i: chr(97 + i) for i in range(26)})

    def __missing__(self, code: int) -> str | int | None:
        gone = any(low <= code <= high for low, high in _MARKS) or unicodedata.category(chr(code)) == "Cf"
        self[code] = found = None if gone else code
        return found


_TABLE = _Table()
_UNMARKED = _Unmarked()
_FOREIGN = tuple(re.compile(before + r"[^\w\s\x00-\u02ff]+") for before in (r"(?<=[a-z0-9])", r"(?<=[a-z0-9]\s)"))
"""What stands on a Latin letter, or on the space after one, and may be a mark of another script."""


def spaceless(character: str) -> bool:
    """Whether a character belongs to a script that puts no spaces between words."""
    code = ord(character)
    return code >= 0x0E00 and any(low <= code <= high for low, high in _SPACELESS)


def _unescaped(text: str) -> str:
    """Entities, %XX, backslash escapes and tags as what they stand for. What a tag holds besides its name stays."""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    if "%" in text:
        text = _ENCODED.sub(lambda m: urllib.parse.unquote(m[0]), text)
    if "\\" in text:
        text = _ESCAPED.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else " ", text)
    if "<" in text:
        text = _TAG.sub(lambda m: f" {m[1]} " if m[1] else "", text)
    return text


def fold(text: str) -> str:
    """The text in small Latin letters where they look so; other alphabets stay. Punctuation stays."""
    text = _unescaped(text)
    if text.isascii():
        return text.lower()
    text = _MIXED.sub(lambda m: m[0].translate(_CAPITALS), text)
    small = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    small = unicodedata.normalize("NFKD", small.translate(_UNMARKED).casefold())
    for pattern in _FOREIGN:
        small = pattern.sub(lambda m: "".join(c for c in m[0] if unicodedata.category(c)[0] != "M"), small)
    return unicodedata.normalize("NFC", small)


def split(folded: str) -> list[str]:
    """Words of a folded text without punctuation; single characters of languages without spaces. A sign between two numbers is a word."""
    if any(digit in folded for digit in "0123456789"):
        folded = _OPERATOR.sub(lambda m: f" {chr(_PRIVATE + ord(m[2] or m[3]) % 0x1000)} ", folded)
    return folded.translate(_TABLE).split()


def plain(folded: str) -> list[str]:
    """Words of a folded text for likeness: signs and digits inside words as the letters they look like, no plural s."""
    if any(sign in folded for sign in "@$!|€"):
        folded = _SIGNS.sub(lambda m: m[0].translate(_AS_LETTERS), folded)
    return [stem(word) for word in split(folded)]


def stem(word: str) -> str:
    """A word without every s at its end; digits in a word with letters are letters."""
    if not word.isalpha() and not word.isdecimal() and any(c.isalpha() for c in word):
        word = word.translate(_DIGITS)
    base = word.rstrip("s")
    if len(base) < 3 or base == word:
        return word
    return base[:-2] + "y" if base.endswith("ie") and len(base) > 4 else base
