"""longllava.display: what progress says where there is no terminal, and on one."""

import io
import re

from rich.console import Console

from longllava.display import progress_on


def lines_of(terminal: bool) -> str:
    file = io.StringIO()
    with progress_on(Console(file=file, force_terminal=terminal, width=200)) as progress:
        progress.stage("build", 100, "samples")
        progress.advance(40, rejected={"broken-image": 2}, new=False)
        progress.advance(10, images=30, rejected={"broken-image": 1, "media-missing": 5})
        progress.advance(50, images=150)
        progress.note("all is done")
    return file.getvalue()


def test_plain_lines_tell_speed_time_left_and_rejects_by_reason() -> None:
    first, last, note = lines_of(terminal=False).splitlines()
    assert re.match(r"build: 40/100 samples, 0 s, 2 rejected \(2 broken-image\)$", first)
    assert re.search(r"100/100 samples, .*images/s, 8 rejected \(5 media-missing, 3 broken-image\)$", last)
    assert note == "all is done"


def test_what_an_earlier_run_has_done_says_nothing_about_the_time_left() -> None:
    from longllava.display import _Counting

    counting = _Counting()
    counting.stage("build", 100, "samples")
    counting.advance(90, new=False)
    assert counting.left() is None
    counting.started -= 10
    counting.advance(5)
    assert 9.9 < (counting.left() or 0) < 11


def test_a_terminal_sees_one_bar_with_all_of_it() -> None:
    shown = lines_of(terminal=True)
    assert "100/100" in shown
    assert "8 rejected (5 media-missing, 3 broken-image)" in shown
    assert "0:00:00 left" in shown
