"""Offline: mkdocs' hook that makes pages which need no network.

- LaTeX becomes MathML, which browsers draw without a script.
- A page that would fetch anything is refused.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
FETCHED = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="?(?:https?:)?//[^">]*|<link[^>]*rel="?stylesheet[^>]*//[^>]*')


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page with its formulas drawn. Raises PluginError for LaTeX that MathML has nothing for."""

    def drawn(found: re.Match[str]) -> str:
        latex = html.unescape(found[3]).strip()
        formula = convert(latex, display="block" if found[2] == "[" else "inline")
        if "\\" in re.sub("<[^>]*>", "", formula):  # a command that the converter does not know stays as it is
            raise PluginError(f"{page.file.src_path}: {latex!r} has a command that latex2mathml lacks; reword it")
        return f'<{found[1]} class="formula">{formula}</{found[1]}>'

    return FORMULA.sub(drawn, content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The page as it is. Raises PluginError where a browser would fetch something from elsewhere."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_path}: {found[0]} is fetched from elsewhere; keep a copy in docs/")
    return output
