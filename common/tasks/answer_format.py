r"""How a completion is laid out: d1's format rewards (arXiv 2504.12216), as they are meant.

Deviations from its published training code, where that code does not do what it says:

- The strict pattern asks for a line break after `</answer>`, which a decoded completion seldom has; here it may lack.
- The tag count takes 0.001 for every character of the *whole* text where nothing follows `</answer>`; here only for
  what follows it, and never goes below 0.
- A box in the answer is looked for as backspace + "oxed" and never found; here it is. d1's 0.25 for an answer without a
  box is dropped: it is paid for an empty completion too. A box has to be closed and to hold something.
"""

import re

from common.tasks.task import boxed_answers

_SOFT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
_STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL)
TAG_SHARE = 0.125
_PER_CHARACTER = 0.001


def soft_format(completion: str) -> float:
    """1 if it starts with <reasoning>…</reasoning> and <answer>…</answer>, else 0."""
    return float("</answer>" in completion and _SOFT.match(completion) is not None)


def strict_format(completion: str) -> float:
    """1 if it is just the two pairs of tags, each tag on a line of its own, else 0."""
    # what `.*?` may swallow is told by counting: every tag stands once
    once = all(completion.count(tag) == 1 for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    return float(once and _STRICT.fullmatch(completion) is not None)


def xml_count(completion: str) -> float:
    """0.125 for each of the four tags that stands exactly once on its line, less 0.001 a character after the last."""
    count = TAG_SHARE * sum(
        completion.count(tag) == 1 for tag in ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    )
    after = completion.rpartition("\n</answer>")[2].strip() if "\n</answer>" in completion else ""
    return max(0.0, count - _PER_CHARACTER * len(after))


def boxed_in_answer(completion: str) -> float:
    r"""0.5 for a closed <answer>…</answer>, 1 if there is a \boxed{…} with something in it too, else 0."""
    _, opened, rest = completion.partition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    return (0.5 + 0.5 * any(box.strip(" .…") for box in boxed_answers(content))) if opened and closed else 0.0
