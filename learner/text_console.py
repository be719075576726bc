"""Text console: where every command prints for people. What is printed was often written by users, models or files."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# what a terminal would obey: C0 but for tabs and line ends, DEL, C1
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))


def without_controls(text: str) -> str:
    """A text without the characters that steer a terminal."""
    return text.translate(_CONTROLS)


class _TextConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Texts lose their control characters; those of the console itself are kept."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else without_controls(text), style, control)


def text_console(**how: Any) -> Console:
    """A console that prints texts as they are: nothing in them is markup, an emoji's name, or to be highlighted.

    Args:
        how: of `Console`.
    """
    return _TextConsole(markup=False, emoji=False, highlight=False, **how)
