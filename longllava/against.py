"""Joins what checks builds to what makes them, which know nothing of one another, for `validate --against`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from pipelines.progress import Progress
from validators.against import Against, Rebuilt


@contextmanager
def check_against(
    build: str, data: str | None, share: float, seed: int, workers: int | None, progress: Progress
) -> Iterator[Against | None]:
    """How the validators get samples of a build made once more; None if there are no data to make them of.

    Args:
        build: folder or URL.
        data: folder or URL that holds a folder for each source.
        share, seed: which samples, see `Against`.
        workers: CPUs to use.
    """
    if data is None:
        yield None
        return
    from pipelines.executor import Executor
    from pipelines.rebuild import Rebuilder

    with Rebuilder(build, data, Executor(workers), progress) as rebuilder:
        yield Against(lambda rows: (Rebuilt(**asdict(one)) for one in rebuilder(rows)), share, seed)
