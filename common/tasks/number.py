r"""Numbers as people and models write them: 1,234, -.5, 3/4, \frac{3}{4}, 2\frac{1}{2}, $18.90, 20\%, 2\cdot10^5, 5 cm.

- Values are exact fractions. A percentage is the number before its sign.
- What follows a number is its unit: 5 cm, 60\text{ miles/hour}. Hundred to trillion multiply it. Words that go on
  computing or naming a number (12 over seven, 3 squared, 2 and a half) make it none. A dozen stays a unit, since who
  says "6 dozen" was mostly asked for dozens.
- Only ASCII digits; a number of more than 60 characters is none, so the work is bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen|twenty"
)
"""The names of 0 to 20, in order, as a pattern."""
_MOST = 60
_SCALE = "hundred|thousand|million|billion|trillion"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_LOW = r"0*[1-9][0-9]*"
_FRAC = (
    rf"\\frac\s*(?:\{{\s*(?P<top>-?[0-9]+)\s*\}}|(?P<top1>[0-9]))\s*(?:\{{\s*(?P<low>-?{_LOW})\s*\}}|(?P<low1>[1-9]))"
)
_SLASH = rf"(?P<over>{_DIGITS})\s*/\s*(?P<under>{_LOW})(?!\.?[0-9]|,[0-9]{{3}})"
_POWER = r"(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?[0-9]{1,2})\s*\}|(?P<power1>[0-9])))"
_NUMBER = (
    rf"(?:(?:(?P<whole>{_DIGITS})\s*)?{_FRAC}|(?:(?P<and>{_DIGITS})[ \t]+)?{_SLASH}|(?P<plain>{_DECIMAL}){_POWER}?)"
    rf"(?P<scale>(?:[\s-]+(?i:{_SCALE})s?\b(?!-(?!(?i:{_SCALE})s?\b)))*)"  # two hundred-dollar bills are two
)
_UNIT = (
    r"(?P<unit>(?:\s*%|(?:\s+|(?<=[0-9}])-|\s*/\s*)(?:[A-Za-z]{3,}(?:-[A-Za-z]+)*|[ckm]?m|kg|ft|in|mi|hr|lb|oz|pm|am)"
    r"(?:\s*\^\s*\{?[23]\}?)?\.?)*)"
)
_WHOLE = re.compile(rf"(?P<sign>[+-]?)\s*{_NUMBER}{_UNIT}\s*\.?")
_ANYWHERE = re.compile(rf"(?:(?<![0-9.,\w)}}])(?P<sign>-)\s?)?{_NUMBER}")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_UNIT = re.compile(
    rf"^(?:squared|cubed)\b|\b(?:{_SCALE})s?\b(?!-)|\b(?:{WORDS}|(?:thir|for|fif|six|seven|eigh|nine)ty|half|halves|thirds"
    r"|(?:four|fif|six|seven|eigh|nin|ten|twelf|twentie|hundred|thousand)ths"
    r"|plus|minus|over|divided|multiplied|factorial|power|or|pi)s?\b",
    re.IGNORECASE,
)
_FONT = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|rm)\s*"
_TEXT = re.compile(_FONT + r"\{([^{}]*)\}")
_LABEL = re.compile(
    rf"(?:(?<=[0-9}})$%])|(?<=circ))(?:(?:\s|~|\\[,;:! ]|\\quad|\\cdot|/)*{_FONT}\{{[^{{}}0-9=]*\}}"
    r"(?:\s*\^\s*(?:[23]|\{\s*-?[1-3]\s*\}))?)+[\s.$]*$"
)
_NO_LETTER = re.compile(r"\b[^\W0-9_aACFgJKLlmNsVWh]\b")  # a letter that is no unit: 2\text{i}, 5\mathrm{x}
_DROPPED = re.compile(
    r"\\[!,;:]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])|(?<!\\)\\[()\[\]]"
    r"|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?\$"
)
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^\s*\{\s*(?:st|nd|rd|th)\s*\}|(?<=[0-9])(?:st|nd|rd|th)\b")
_BRACKETED = re.compile(r"\(([^,]*)\)|\{(.*)\}", re.DOTALL)  # (1,200) is a point


@dataclass(frozen=True)
class Number:
    """What a text says as a number."""

    value: Fraction
    reduced: bool
    """False for a fraction that is not in lowest terms."""
    fraction: bool
    """Whether it is written as a fraction or a mixed number."""


def plain(text: str) -> str:
    r"""A text without what only decorates it: spacing, \left, $, degrees, \text{…}, ordinals; \dfrac becomes \frac."""
    text = text.replace("−", "-").replace("{,}", ",").replace(r"\%", "%").replace(r"\ ", " ").replace("~", " ")
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\cfrac", r"\frac")
    text = re.sub(r"\\q?quad(?![A-Za-z])", " ", re.sub(r",\\!\s+", ",", text))
    return _ORDINAL.sub("", _TEXT.sub(r" \1 ", _DROPPED.sub("", text))).strip()


def without_unit(text: str) -> str:
    r"""A text without the \text{…} or \mathrm{…} that ends it, where that is a unit and no scale."""
    label = _LABEL.search(text)
    if label is None:
        return text
    words = " ".join(" ".join(_TEXT.findall(label.group())).replace(".", "").split())
    return text if _NO_UNIT.search(words) or _NO_LETTER.search(words) else text[: label.start()].rstrip()


def read_number(text: str) -> Number | None:
    """The number that a text is, all of it but for a unit and one pair of brackets; None where it is something else."""
    if len(text) > 4 * _MOST:
        return None
    said = plain(without_unit(text))
    bracketed = _BRACKETED.fullmatch(said)
    found = _WHOLE.fullmatch(said if bracketed is None else (bracketed[1] or bracketed[2] or "").strip())
    if found is None or _NO_UNIT.search(found["unit"].strip(" -")):
        return None
    return _read(found)


def numbers_in(text: str) -> list[Fraction]:
    """Every number in a text, in order: decimals, fractions and mixed numbers, with hundred to trillion multiplied."""
    found = (_read(match) for match in _ANYWHERE.finditer(plain(text)))
    return [number.value for number in found if number is not None]


def _read(found: re.Match[str]) -> Number | None:
    part = {name: group or "" for name, group in found.groupdict().items()}
    if any(len(group) > _MOST for name, group in part.items() if name != "unit"):
        return None
    top = part["top"] or part["top1"] or part["over"]
    low = part["low"] or part["low1"] or part["under"]
    value = _exact(part["plain"] or part["whole"] or part["and"] or "0")
    power = part["power"] or part["power1"]
    if power:
        value *= Fraction(10) ** int(power)
    reduced = True
    if top:
        ratio = _exact(top) / int(low)
        if ratio < 0 and part["whole"]:
            return None
        value += ratio
        reduced = ratio.denominator == abs(int(low))
    for word in re.findall("[a-z]+", part["scale"].lower()):
        value *= 10 ** _SCALES[word.removesuffix("s")]
    return Number(-value if part["sign"] == "-" else value, reduced, bool(top))


def _exact(written: str) -> Fraction:
    return Fraction(written.replace(",", ""))
