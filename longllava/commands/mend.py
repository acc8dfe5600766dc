"""Commands that go back to a build's sources: retry."""

from pathlib import Path
from typing import Annotated

import typer

from formats.errors import UsageError
from longllava.commands.terminal import print_json, program, stderr, stdout


def retry(
    build: Annotated[Path, typer.Argument(help="Directory of a build.", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", help="Folder or URL with the sources; where the build had it by default.")
    ] = None,
    catalog: Annotated[
        Path | None, typer.Option(help="Where catalogs are kept; where the build had them by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="CPUs to use on this machine; all by default.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help='Ray cluster to run on, such as "auto"; a local Ray by default.')
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which rejected records could be used now, and stop.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
    ] = False,
) -> None:
    """Try a build's rejected records again after their media were mended, and make anew what that changes.

    The build is then, byte for byte, what it would have been had the media been right from the start.

    Example: longllava retry builds/single_image --dry-run
    """
    from longllava.display import progress_on
    from longllava.display_builds import retried
    from pipelines.retry import rehearse, request_of
    from pipelines.retry import retry as run

    if "://" in str(build) or not build.is_dir():
        raise UsageError(f"{build} is no local directory; a retry writes to the build, so bring it here first")
    request = request_of(build, data, catalog, workers, address)
    with progress_on(stderr()) as progress:
        result = rehearse(request, progress) if dry_run else run(request, progress)
    if json_output:
        print_json(result)
        return
    for part in retried(result):
        stdout().print(part, highlight=False)
    if dry_run and (result["mended"] or result["changed"]):
        stdout().print(f"next: {program()} retry {build}", markup=False, highlight=False, soft_wrap=True)
