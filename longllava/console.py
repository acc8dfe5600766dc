"""A rich console that prints text as text, whoever wrote it."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from longllava.commands.terminal import printable


class PlainConsole(Console):
    """Prints what builds, recipes and ledgers say without letting it steer the terminal.

    Nothing in a text is markup, an emoji's name or a control character; only styles that the program gives count.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with characters that would steer a terminal made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
