"""Arithmetic that a model wrote, evaluated exactly and safely.

    sum     = ["-"] product { ("+" | "-") product }
    product = atom { ("*" | "/") atom }
    atom    = number | "(" sum ")"
    number  = "0" | "1".."9" { "0".."9" }

- Only ASCII digits, the four operators, parentheses and white space exist; there is no power, no floor division, no
  decimal point and no name, so the work is bounded by the length of the text. Nothing is handed to Python's own parser.
- A minus sign may open a sum ("-23+29+33", which d1 accepts too) but may not follow another operator.
- Values are exact fractions. Whatever is wrong with the text, the error is ExpressionError.
"""

from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 200
# Far above what a sensible answer needs, far below Python's recursion limit (three calls per level).
MAX_DEPTH = 20

_DIGITS = frozenset("0123456789")
_SYMBOLS = frozenset("+-*/()")
_SPACES = frozenset(" \t\r\n")


class ExpressionError(ValueError):
    """The text is not an expression of this grammar, or has no value."""


class Evaluated(NamedTuple):
    """What an expression comes to."""

    value: Fraction
    numbers: tuple[int, ...]
    """Every number in it, in reading order, with repetitions."""


def evaluate(text: str) -> Evaluated:
    """Value of an arithmetic expression and the numbers it uses. Raises ExpressionError, and nothing else."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    parser = _Parser(_tokens(text))
    value = parser.sum()
    if parser.peek():
        raise ExpressionError(f"{parser.peek()!r} where an operator or the end was expected")
    return Evaluated(value, tuple(parser.numbers))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    while position < len(text):
        character = text[position]
        end = position + 1
        if character in _DIGITS:
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            if character == "0" and end - position > 1:
                raise ExpressionError(f"{text[position:end]!r} starts with 0")
        elif character not in _SYMBOLS and character not in _SPACES:
            raise ExpressionError(f"{character!r} at character {position + 1}; only digits, + - * / ( ) are read")
        if character not in _SPACES:
            tokens.append(text[position:end])
        position = end
    return tokens


class _Parser:
    """Recursive descent over the tokens of one expression, evaluating as it goes."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        """The next token, "" at the end."""
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def _take(self) -> str:
        token = self.peek()
        self._position += 1
        return token

    def sum(self) -> Fraction:
        negative = self.peek() == "-"
        if negative:
            self._take()
        value = -self._product() if negative else self._product()
        while self.peek() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while self.peek() in ("*", "/"):
            if self._take() == "*":
                value *= self._atom()
                continue
            divisor = self._atom()
            if divisor == 0:
                raise ExpressionError("division by zero")
            value /= divisor
        return value

    def _atom(self) -> Fraction:
        token = self._take()
        if token == "(":
            return self._group()
        if not token or token in _SYMBOLS:
            raise ExpressionError(f"{token or 'the end'!r} where a number or ( was expected")
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])

    def _group(self) -> Fraction:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpressionError(f"parentheses nested deeper than {MAX_DEPTH}")
        value = self.sum()
        if self._take() != ")":
            raise ExpressionError("a parenthesis is not closed")
        self._depth -= 1
        return value
