"""Training on a terminal: a bar with what matters now, or a line now and then."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

Watch = Callable[[Mapping[str, Any]], None]
STARVED = 0.2
"""Share of a step spent waiting for data above which the user is told, once."""


@contextmanager
def steps_on(console: Console) -> Iterator[Watch]:
    """What shows the steps of a run: a live bar on a terminal, plain lines elsewhere."""
    warn = _Starvation(console)
    if not console.is_terminal:

        def plain(step: Mapping[str, Any]) -> None:
            console.print(
                f"step {step['step']:,}/{step['steps']:,}  {described(step)}", highlight=False, soft_wrap=True
            )
            warn(step)

        yield plain
        return
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[details]}"))
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("train", total=None, details="")

        def live(step: Mapping[str, Any]) -> None:
            bar.update(task, total=step["steps"], completed=step["step"], details=described(step))
            warn(step)

        yield live


def described(step: Mapping[str, Any]) -> str:
    """A step in one line: loss and that of each source, speed, share of the hardware's, memory, time left."""
    sources = ", ".join(f"{name} {loss:.3f}" for name, loss in step["loss_by_source"].items())
    mfu = f"  MFU {step['mfu']:.1%}" if step["mfu"] is not None else ""
    return (
        f"loss {step['loss']:.4f} ({sources})  {step['tokens_per_second']:,.0f} tokens/s"
        f"  {step['images_per_second']:,.1f} images/s{mfu}  {step['memory'] / 1e9:.1f} GB  {_time(step['eta'])} left"
    )


class _Starvation:
    """Says once that the model waits for data; the first step, which fills the pipe, does not count."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = False

    def __call__(self, step: Mapping[str, Any]) -> None:
        if self._said or step["step"] == 1 or step["feed_wait"] < STARVED:
            return
        self._said = True
        self._console.print(
            f"the model waits for data {step['feed_wait']:.0%} of the time: more --threads, or builds on a faster disk",
            highlight=False,
        )


def outline_tables(outline: Mapping[str, Any]) -> list[Table]:
    """What a run would do, and what memory each process would take."""
    what = Table(title="what would be done", title_justify="left", show_header=False)
    for name, value in {**outline["stage"], **outline["run"]}.items():
        shown = ", ".join(value) if isinstance(value, list | tuple) else value
        what.add_row(
            name.replace("_", " "), f"{shown:,}" if isinstance(shown, int) and shown is not True else str(shown)
        )
    memory = Table("memory of each process", "GB", title=f"on {outline['processes']} processes", title_justify="left")
    for name, size in outline["memory"].items():
        memory.add_row(name, f"{size / 1e9:,.2f}")
    memory.add_row("all", f"{sum(outline['memory'].values()) / 1e9:,.2f}", style="bold")
    return [what, memory]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
