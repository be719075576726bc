"""Expressions over positive integers in a canonical form: the ones that Countdown generates and demonstrates.

- A term is a number, a sum or a product. A sum holds what is added and what is subtracted, a product what is
  multiplied and what is divided by; sums inside sums and products inside products are merged. Trees that differ only in
  grouping or order, such as a-(b-c) and c+a-b, are therefore one term with one rendering.
- Every value is a positive integer, so are the values of a rendering's steps from left to right.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Term:
    """An expression, its value, and what it takes to write it."""

    kind: Literal["number", "sum", "product"]
    value: int
    multiplications: int
    """How many of its operators are * or /."""
    direct: tuple["Term", ...] = ()
    """Parts that are added or multiplied, greatest first; none in a number."""
    inverse: tuple["Term", ...] = ()
    """Parts that are subtracted or divided by, greatest first."""


def leaf(number: int) -> Term:
    """A number as a term."""
    return Term("number", number, 0)


def combine(left: Term, right: Term) -> list[Term]:
    """Every way to join two terms, in either order, that gives a positive integer; at least their sum and product."""
    great, small = (left, right) if left.value >= right.value else (right, left)
    joined = [_join("sum", great, small, great.value + small.value, invert=False)]
    if great.value > small.value:
        joined.append(_join("sum", great, small, great.value - small.value, invert=True))
    joined.append(_join("product", great, small, great.value * small.value, invert=False))
    if great.value % small.value == 0:
        joined.append(_join("product", great, small, great.value // small.value, invert=True))
    return joined


def render(term: Term) -> str:
    """The term as text, with no parentheses but those that its value needs."""
    if term.kind == "number":
        return str(term.value)
    plus, minus = ("+", "-") if term.kind == "sum" else ("*", "/")
    return plus.join(_part(part, term) for part in term.direct) + "".join(
        minus + _part(part, term) for part in term.inverse
    )


def _part(part: Term, whole: Term) -> str:
    # Parts never have the kind of the whole, so a sum inside a product is the only case that needs them.
    return f"({render(part)})" if part.kind == "sum" and whole.kind == "product" else render(part)


def _join(kind: Literal["sum", "product"], left: Term, right: Term, value: int, *, invert: bool) -> Term:
    direct, inverse = _sides(kind, left)
    others = _sides(kind, right)
    if invert:
        others = others[::-1]
    multiplications = left.multiplications + right.multiplications + (kind == "product")
    return Term(kind, value, multiplications, _ordered(direct + others[0]), _ordered(inverse + others[1]))


def _sides(kind: str, term: Term) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    return (term.direct, term.inverse) if term.kind == kind else ((term,), ())


def _ordered(parts: tuple[Term, ...]) -> tuple[Term, ...]:
    return tuple(sorted(parts, key=lambda part: (-part.value, render(part))))
