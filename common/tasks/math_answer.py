r"""Whether two mathematical answers are the same, as MATH (arXiv 2103.03874) asks: value and, where asked for, form.

- Texts that differ only in how LaTeX sets them are the same.
- Where the truth is a number, the answer has to be one too, exactly equal: 37/3 - 1/3 is no answer that says 12. A
  fraction counts in lowest terms only, as MATH writes all of its own; where the question asks for a fraction, a decimal
  or a mixed number, the answer has to be one.
- What is set equal to names and terms of other letters (x_1 = 3, 3 = x, f^{-1}(x) = 3) counts; a chain of different
  values says none of them.
- Of a number in a base, 2516_8, the digits count, and the base where the answer gives one.
- Where the truth is a name (a word of four letters, several words) or a choice, letters count and not their case or
  brackets.
- Everything else (roots, intervals, sets, tuples, matrices, terms) is compared by `math-verify`, a decimal as the exact
  fraction that it is: 3.141593 is not pi. Where the question asks to factor, expand or simplify, what it parses has to
  read the same, since (x+1)^2 is no expansion of itself.
- math-verify keeps its time with SIGALRM, which only a main thread has: elsewhere its caller bounds the time, as
  `actors.reward_pool` does. Towers of powers and answers of more than 300 characters are not given to it; an answer
  that is as much longer than the truth is another one.
"""

import logging
import re
import threading
from typing import Any

from common.tasks.number import WORDS, Number, plain, read_number, without_unit

MOST_CHARACTERS = 300
SECONDS = 2  # of math-verify, for one expression
_FRACTION_ASKED = re.compile(r"\b(?:as|into) an? (?:\w+ ){0,3}fraction|common fraction", re.IGNORECASE)
_DECIMAL_ASKED = re.compile(r"\bas a decimal|decimal (?:form|places?)", re.IGNORECASE)
_MIXED_ASKED = re.compile(r"\bmixed number", re.IGNORECASE)
_FORM_ASKED = re.compile(r"\b(?:factor|expand|simplif|simplest|rationali[sz]e)", re.IGNORECASE)
# Powers of powers and factorials that no one can write out; Python cannot be stopped while it computes one.
_TOWER = re.compile(
    r"\^[^+\-=,;a-zA-Z]*\^|\^\s*\{(?:[^{}a-zA-Z\\]|\\cdot|\\times)*\^|\^\s*-?[0-9]{4,}|"
    r"\^\s*\{(?:[^{}]|\{[^{}]*\})*\{?[^{}]*(?<![0-9.])[0-9]{4,}|\^.*!|!.*[!^]|[0-9]{4,}[)}\]\s]*!|binom.*[0-9]{4,}|"
    r"[0-9.][eE][+-]?[0-9]{3,}",
    re.DOTALL,
)
_BRACED = re.compile(r"\\(frac|sqrt)\s*(?:([0-9a-zA-Z])\s*(?=[0-9a-zA-Z\\{])|([0-9a-zA-Z]))")
_EQUALS = re.compile(r"(?<![<>!:])=")
_SEVERAL = re.compile(r"[,;]|\b(?:or|and)\b")
_NO_LETTERS = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "phi", "varphi", "omega", "ell"}
_NAME = re.compile(r"[(\[]?\s*([A-Za-z][A-Za-z .,'-]*?)\s*[)\]]?\.?")
_TEXT_ONLY = re.compile(r"\s*\\(?:text|textbf|textrm|mathrm|mbox)\s*\{[^{}]*\}\s*")
_DELIMITER = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])|\\(?:display|text)style(?![A-Za-z])")
_WORDY = re.compile(r"[A-Za-z]{4}|[A-Za-z]{2,} +[A-Za-z]{2,}")
_FONT = r"\\(?:text|mathrm|mbox|overline|mathbf)\s*\{[^{}]*\}"
_VARIABLE = re.compile(
    rf"\s*(?:m\s*)?(?:\\angle\s*)?(?:[A-Za-z]+(?:\s+[A-Za-z]+)*|\\[a-z]+|{_FONT})\s*"
    r"(?:_\s*(?:[A-Za-z0-9]|\{[^{}]*\}))?'?\s*(?:\([^()=,]*\))?\s*"
)
_BASED = re.compile(
    r"\s*\(?(?P<digits>-?[0-9A-Z, ]*[0-9][0-9A-Z, ]*)\)?\s*"
    r"(?:_\s*(?P<base>[0-9]+|[A-Za-z]+|\{[^{}]*(?:\{[^{}]*\})?\s*\})|\(?\s*base\s*(?P<named>[0-9]+|[A-Za-z]+)\s*\)?)\s*"
)


def same_answer(truth: str, given: str, question: str = "") -> bool:
    """Whether an answer counts as the true one. Never raises."""
    if not given.strip() or len(given) > len(truth) + MOST_CHARACTERS:
        return False
    true, found = (_without_names(_DELIMITER.sub("", text)) for text in (truth, given))
    based, told = _based(true), _based(found)
    if based is not None:
        return (told or (_digits(found), based[1])) == based
    if told is not None and told[1] == "10":
        found = told[0]
    expected, number = read_number(true), read_number(found)
    if expected is not None:
        return number is not None and _same_number(expected, number, question)
    if _canonical(true) == _canonical(found):
        return True
    name, said = _NAME.fullmatch(plain(true)), _NAME.fullmatch(plain(found))
    if _says_another(true, found, question):
        return False
    texts = _TEXT_ONLY.fullmatch(true) or _TEXT_ONLY.fullmatch(found)
    if name is not None and (texts or len(name.group(1)) == 1 or _WORDY.search(name.group(1))):
        return said is not None and said.group(1).casefold() == name.group(1).casefold()
    return _verified(true, found, form=_FORM_ASKED.search(question) is not None)


def _says_another(truth: str, given: str, question: str) -> bool:
    """Whether one side of a chain of equations is another value than the truth: one that has no other letters."""
    if _EQUALS.search(truth) or _SEVERAL.search(given):
        return False
    sides, known = _EQUALS.split(given), _letters(truth)
    return len(sides) > 1 and any(_letters(one) <= known and not same_answer(truth, one, question) for one in sides)


def _letters(text: str) -> set[str]:
    """Names of variables, of Greek letters too."""
    commands = {name for name in re.findall(r"\\([A-Za-z]+)", text) if name in _GREEK}
    return commands | set(re.findall("[A-Za-z]", _NO_LETTERS.sub(" ", text))) - {"e", "i"}


def _without_names(text: str) -> str:
    """What a text sets equal to names; all of it where it sets nothing, or several values, equal to them."""
    sides = text.split("=")
    while len(sides) > 1 and _VARIABLE.fullmatch(sides[0]):
        del sides[0]
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and read_number(sides[0]) is not None:
        del sides[1]
    return "=".join(sides)


def _based(text: str) -> tuple[str, str] | None:
    """The digits and the base of a number like 2516_8; None for anything else."""
    found = _BASED.fullmatch(plain(text))
    if found is None:
        return None
    told = (found["base"] or found["named"]).strip("{} ").casefold().removeprefix("base").strip()
    words = WORDS.split("|")
    return _digits(found["digits"]), str(words.index(told)) if told in words else told


def _digits(text: str) -> str:
    return re.sub(r"[\s,]", "", plain(text))


def _same_number(truth: Number, given: Number, question: str) -> bool:
    if truth.value != given.value or not given.reduced:
        return False
    if truth.value.denominator == 1 or truth.fraction == given.fraction:
        return True
    asked = _FRACTION_ASKED if truth.fraction else _DECIMAL_ASKED
    return asked.search(question) is None and _MIXED_ASKED.search(question) is None


def _canonical(text: str) -> str:
    """The text with one spelling for what LaTeX sets alike."""
    text = plain(without_unit(text)).rstrip(".").replace("%", "").replace(r"\\", "\\")
    previous = None
    while previous != text:
        previous, text = text, _BRACED.sub(lambda m: rf"\{m[1]}{{{m[2] or m[3]}}}", text, count=1)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}", text)
    return re.sub(r"\s+", "", text)


def _verified(truth: str, given: str, *, form: bool) -> bool:
    if max(len(truth), len(given)) > MOST_CHARACTERS or _TOWER.search(given):
        return False
    from math_verify import verify

    expected, found = _parsed(truth), _parsed(given)
    if not expected or not found:
        return False
    try:
        if form:
            return str(expected[0]) == str(found[0])
        expected, found = _exact(expected), _exact(found)
    except Exception:  # sympy has its limits: digits, depth
        return False
    # a bare pair is no interval, and an interval no pair: what the truth is decides; x>5 is the interval (5, oo)
    return bool(verify(expected, found, allow_set_relation_comp=True, timeout_seconds=_seconds()))


def _exact(parsed: list) -> list:
    """Parsed terms with decimals as fractions: math-verify rounds both sides of a comparison with a decimal."""
    from sympy import Float, Rational

    def fractions(term: Any) -> dict:
        # of what a power or an exponential made of a decimal, no one may want all digits
        return {one: Rational(str(one)) for one in term.atoms(Float) if not one or 1e-60 < abs(one) < 1e60}

    return [term if isinstance(term, str) else term.xreplace(fractions(term)) for term in parsed]


def _parsed(text: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    cleaned = text.replace(r"\$", "").replace("$", "")
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(f"${cleaned}$", extraction_config=targets, parsing_timeout=_seconds())


def _seconds() -> int:
    """Time for math-verify; 0, which is no limit, where there is no main thread to interrupt."""
    return SECONDS if threading.current_thread() is threading.main_thread() else 0


def prepare() -> None:
    """Import what is slow to import (sympy: 1.4 s), and parse once: the grammar is built then."""
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it warns of each answer that it cannot parse
    _verified(r"\sqrt{2}", r"\sqrt{3}", form=False)
