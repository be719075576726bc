r"""Numbers as people and models write them: 1,234, -.5, 3/4, \frac{3}{4}, 2\frac{1}{2}, $18.90, 20\%, 2\cdot10^5, 5 cm.

- Values are exact fractions. A percentage is the number before its sign.
- Only ASCII digits; a number of more than 60 characters is none, so the work is bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_MOST = 60
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_FRAC = r"\\frac\s*(?:\{\s*(?P<top>-?[0-9]+)\s*\}|(?P<top1>[0-9]))\s*(?:\{\s*(?P<low>[0-9]+)\s*\}|(?P<low1>[0-9]))"
_SLASH = r"(?P<over>[0-9]+)\s*/\s*(?P<under>[0-9]+)"
_POWER = r"(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?[0-9]{1,2})\s*\}|(?P<power1>[0-9])))"
_UNIT = r"(?:\s*%|(?:\s+|(?<=[0-9}])-)(?:[A-Za-z]{3,}|[ckm]?m|kg|ft|in|mi|hr|lb|oz|pm|am)(?:\s*\^\s*\{?[23]\}?)?\.?)*"
_WHOLE = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>{_DIGITS})?\s*{_FRAC}|(?:(?P<and>{_DIGITS})\s+)?{_SLASH}"
    rf"|(?P<plain>{_DECIMAL}){_POWER}?){_UNIT}\s*\.?"
)
_ANYWHERE = re.compile(rf"(?:(?<![0-9.,\w)}}])-\s?)?{_DECIMAL}")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|rm)\s*\{([^{}]*)\}")
_DROPPED = re.compile(r"\\[!,;:]|\\left(?![a-z])|\\right(?![a-z])|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?\$")
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^\s*\{\s*(?:st|nd|rd|th)\s*\}|(?<=[0-9])(?:st|nd|rd|th)\b")


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
    return _ORDINAL.sub("", _TEXT.sub(r" \1 ", _DROPPED.sub("", text))).strip()


def read_number(text: str) -> Number | None:
    """The number that a text is, all of it but for a unit; None where it is something else."""
    found = _WHOLE.fullmatch(plain(text)) if len(text) <= 4 * _MOST else None
    if found is None or max(map(len, (group or "" for group in found.groups()))) > _MOST:
        return None
    part = found.groupdict()
    top = part["top"] or part["top1"] or part["over"]
    low = part["low"] or part["low1"] or part["under"]
    value = _exact(part["plain"] or part["whole"] or part["and"] or "0")
    power = part["power"] or part["power1"]
    if power:
        value *= Fraction(10) ** int(power)
    reduced = True
    if top is not None:
        if int(low) == 0:
            return None
        value += Fraction(int(top), int(low))
        reduced = Fraction(int(top), int(low)).denominator == int(low)
    return Number(-value if part["sign"] == "-" else value, reduced, top is not None)


def numbers_in(text: str) -> list[Fraction]:
    """Every decimal number in a text, in order; fractions are two numbers."""
    found = (match.group() for match in _ANYWHERE.finditer(plain(text)))
    return [_exact(one) for one in found if len(one) <= _MOST]


def _exact(written: str) -> Fraction:
    return Fraction("".join(written.replace(",", "").split()))
