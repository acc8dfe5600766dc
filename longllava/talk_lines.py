"""The lines of `longllava chat`: what is a question, what a command, and what is shown with the next question."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from formats.errors import LongLlavaError


class Talk:
    """Reads lines and answers them.

    Args:
        ask: sends a message, prints the answer as it comes, and returns what `model.chat.Chat.ask` does.
        reset: forgets the talk.
        say: prints a line that is no answer.
        media: how media are read: "patched", "fps" and "max_frames" of `model.chat.Media`.
    """

    help = "/image FILE… and /video FILE… are shown with your next question; /reset, /help, /quit"

    def __init__(
        self,
        ask: Callable[[Any], Any],
        reset: Callable[[], None],
        say: Callable[[str], None],
        media: Mapping[str, Any],
    ) -> None:
        self._ask, self._reset, self._say, self._media = ask, reset, say, media
        self._files: dict[str, list[Path]] = {"image": [], "video": []}

    def hear(self, line: str) -> bool:
        """Does what a line says; an error is said, and the talk goes on.

        Returns:
            Whether to go on.
        """
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._question(line)
        except LongLlavaError as error:
            self._say(f"error: {error}")
        return True

    def _command(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb in ("/image", "/video") and rest.strip():
            self._show(verb[1:], rest)
        elif verb == "/reset":
            self._files = {"image": [], "video": []}
            self._reset()
            self._say("forgotten")
        elif verb == "/help":
            self._say(self.help)
        else:
            self._say(f"{verb} is no command by itself: {self.help}")

    def _show(self, kind: str, rest: str) -> None:
        try:
            files = [Path(name) for name in shlex.split(rest)]
        except ValueError as error:
            self._say(f"error: {rest}: {error}")
            return
        absent = [str(file) for file in files if not file.is_file()]
        if absent:
            self._say(f"error: no such file: {', '.join(absent)}")
            return
        self._files[kind] += files
        self._say(f"{', '.join(map(str, files))}: shown with your next question")

    def _question(self, line: str) -> None:
        from model.chat import Media, question

        message = question(line, Media(self._files["image"], self._files["video"], **self._media))
        self._files = {"image": [], "video": []}
        answer = self._ask(message)
        if not answer.ended:
            self._say(f"(cut off after {answer.tokens} tokens; --max-new-tokens allows more)")
