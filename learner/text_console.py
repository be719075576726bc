"""Text console: where every command prints for people. What is printed was often written by users, models or files."""

from typing import Any

from rich.console import Console


def text_console(**how: Any) -> Console:
    """A console that prints texts as they are: nothing in them is markup, an emoji's name, or to be highlighted.

    Args:
        how: of `Console`.
    """
    return Console(markup=False, emoji=False, highlight=False, **how)
