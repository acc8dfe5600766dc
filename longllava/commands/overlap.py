"""Commands that look for what is there twice: duplicates and decontaminate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from longllava.commands.terminal import default_catalog, print_json, stderr, stdout

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="CPUs to use on this machine; all by default.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help='Ray cluster to run on, such as "auto"; a local Ray by default.')
]


def duplicates(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)],
    data: Annotated[str, typer.Option("--data", help="Folder or URL that holds a folder for each source.")],
    catalog: Annotated[Path | None, typer.Option(help="Where catalogs are kept; DATA/catalog by default.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="exact, or near: alike by text and by looks.")] = "near",
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look for what these benchmark fingerprints have, too.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many groups and hits to show.")] = 10,
    workers: WorkersOption = None,
    address: AddressOption = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key; may be repeated.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Show which records of a recipe are copies of others, or stand in benchmarks, without building it.

    Example: longllava duplicates recipes/text.yaml --data DATA --mode exact
    """
    from longllava.display import progress_on
    from longllava.display_overlaps import overlap_tables
    from pipelines.build import Request
    from pipelines.overlap_report import overlap_report
    from pipelines.sources.registry import unknown_names
    from recipes.schema import load_recipe

    chosen = [*(overrides or []), f"duplicates={mode}", *([f"decontaminate={against}"] if against else [])]
    request = Request(
        recipe=load_recipe(recipe, chosen, unknown_names),
        recipe_folder=recipe.parent,
        data=data,
        out=Path("unused"),
        catalog=(catalog or default_catalog(data)).resolve(),
        workers=workers,
        address=address,
    )
    with progress_on(stderr()) as progress:
        found = overlap_report(request, progress, n)
    if json_output:
        print_json(found)
        return
    for part in overlap_tables(found):
        stdout().print(part, highlight=False)


def decontaminate(
    benchmarks: Annotated[str, typer.Argument(help="Folder that holds a folder for each benchmark.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write; name it in recipes as `decontaminate`.")],
    workers: WorkersOption = None,
    address: AddressOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make one file of fingerprints of benchmarks: their questions, pictures and frames.

    Example: longllava decontaminate BENCHMARKS --out benchmarks.parquet
    """
    from longllava.display import progress_on
    from longllava.display_overlaps import benchmarks_table
    from pipelines.benchmark_prints import write_fingerprints
    from pipelines.executor import Executor

    with Executor(workers, address) as executor, progress_on(stderr()) as progress:
        found: dict[str, Any] = write_fingerprints(benchmarks, out, executor, progress)
    if json_output:
        print_json({"out": str(out), "bytes": out.stat().st_size, "benchmarks": found})
        return
    stdout().print(benchmarks_table(found))
    stdout().print(f"{out}: {out.stat().st_size:,} bytes", highlight=False)
