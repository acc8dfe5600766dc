"""The `longllava` command. Each subcommand only translates between the terminal and one function elsewhere."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from formats.errors import LongLlavaError, UsageError
from longllava.commands import look, mend, overlap, talk
from longllava.commands.terminal import default_catalog, print_error, print_json, program, stderr, stdout
from longllava.commands.train import train

app = typer.Typer(
    name="longllava",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Build LongLLaVA's training data from its nine public sources, look at it, and train on it.",
    epilog="Start with `longllava demo`.",
)

DataOption = Annotated[str, typer.Option("--data", help="Folder or URL that holds a folder for each source.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="CPUs to use on this machine; all by default.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help='Ray cluster to run on, such as "auto"; a local Ray by default.')
]
_INTERRUPTED = 130  # exit code after Ctrl-C


def main() -> None:
    """Runs the command; a mistake of the user's ends it with exit code 2 and a message that says what to do."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    try:
        app()
    except UsageError as error:
        print_error(error)
        sys.exit(2)
    except LongLlavaError as error:
        print_error(error)
        sys.exit(1)
    except (SystemExit, KeyboardInterrupt) as end:  # Typer makes one of the other once it has taken over
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        print("stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        sys.exit(_INTERRUPTED)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to put corpora, recipes and builds.")] = Path("demo"),
    workers: WorkersOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make miniature corpora, build and check shards from them, and show what came of it.

    Example: longllava demo --out demo
    """
    from longllava.display import SamplesChecked, build_summary, build_table, findings_table, progress_on
    from pipelines.demo.run import next_steps, run_demo
    from validators.run import validate as check

    with progress_on(stderr()) as progress:
        manifests = run_demo(out, progress, workers=workers)
        findings = [
            finding
            for name in manifests
            for finding in check(str(out / "builds" / name), deep=True, progress=SamplesChecked(progress))
        ]
    if json_output:
        print_json({"out": str(out), "builds": manifests, "findings": [f.as_dict() for f in findings]})
    else:
        for manifest in manifests.values():
            stdout().print(build_table(manifest))
            stdout().print(build_summary(manifest), highlight=False)
        stdout().print(findings_table(findings) if findings else "validated: no findings")
        stdout().print(next_steps(out, program()), markup=False, highlight=False, soft_wrap=True)
    if findings:
        raise typer.Exit(1)


@app.command()
def sources(
    data: Annotated[str | None, typer.Option("--data", help="Look there for what has been downloaded.")] = None,
    json_output: JsonOption = False,
) -> None:
    """List the sources: hub id, licence, expected files and what is there.

    Example: longllava sources --data DATA
    """
    from longllava.display import sources_table
    from pipelines.inventory import inventory

    rows = inventory(data)
    if json_output:
        print_json(rows)
    else:
        sources_table(rows, stdout())


@app.command()
def ingest(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Where to put the catalogs.")],
    source: Annotated[list[str] | None, typer.Option("--source", help="Only this source; may be repeated.")] = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    json_output: JsonOption = False,
) -> None:
    """Read upstream annotations into catalogs; files that have not changed are not read again.

    Example: longllava ingest --data DATA --out DATA/catalog --source llava15
    """
    from longllava.display import catalogs_table, progress_on
    from pipelines.executor import Executor
    from pipelines.ingest import Location, ingested
    from pipelines.inventory import present_sources
    from pipelines.storage import refuse_odd_bytes

    refuse_odd_bytes(out.absolute())
    names = source or present_sources(data)
    if not names:
        raise UsageError(
            f"--data {data} holds no source; `longllava sources --data {data}` says what is expected there"
        )
    places = [Location.below(data, name) for name in names]
    with (
        Executor(workers, address) as executor,
        progress_on(stderr()) as progress,
        ingested(places, out, executor, progress) as catalogs,
    ):
        summaries = {catalog.location.source: catalog.summary() for catalog in catalogs}
    if json_output:
        print_json(summaries)
    else:
        stdout().print(catalogs_table(summaries))


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Build directory; an unfinished build there is resumed.")],
    catalog: Annotated[Path | None, typer.Option(help="Where catalogs are kept; DATA/catalog by default.")] = None,
    scale: Annotated[float, typer.Option(help="Multiply every count, such as 0.001 for a trial.")] = 1.0,
    workers: WorkersOption = None,
    address: AddressOption = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, with sizes estimated from 200 samples, and stop.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Build a recipe into shards, or go on with an unfinished build.

    Example: longllava build recipes/single_image.yaml --data DATA --out builds/single_image --scale 0.001
    """
    from longllava.display import build_summary, build_table, progress_on
    from pipelines.build import Request
    from pipelines.build import build as run
    from pipelines.sources.registry import unknown_names
    from recipes.schema import load_recipe

    request = Request(
        recipe=load_recipe(recipe, overrides or [], unknown_names).scaled(scale),
        recipe_folder=recipe.parent,
        data=data,
        out=out,
        catalog=(catalog or default_catalog(data)).resolve(),
        workers=workers,
        address=address,
    )
    if dry_run:
        _dry_run(request, json_output)
        return
    with progress_on(stderr()) as progress:
        manifest = run(request, progress)
    if json_output:
        print_json({"build": str(out), **{k: manifest[k] for k in ("components", "totals", "recipe_sha256")}})
        return
    stdout().print(build_table(manifest))
    stdout().print(build_summary(manifest), highlight=False)
    steps = "; ".join(f"{program()} {verb} {shlex.quote(str(out))}" for verb in ("stats", "show", "validate"))
    stdout().print(f"next: {steps}", markup=False, highlight=False, soft_wrap=True)


app.command()(look.stats)
app.command()(look.show)
app.command()(look.diff)
app.command()(look.export)
app.command()(mend.retry)
app.command()(overlap.duplicates)
app.command()(overlap.decontaminate)
app.command()(talk.generate)
app.command()(talk.chat)
app.command()(talk.convert)
app.command()(train)


@app.command()
def validate(
    build: look.BuildArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image, too.")] = False,
    against: Annotated[
        str | None, typer.Option("--against", metavar="DATA", help="Rebuild some samples from the sources there, too.")
    ] = None,
    share: Annotated[
        float, typer.Option("--against-share", min=0, max=1, help="Of each component, but at least 8 samples.")
    ] = 0.01,
    seed: Annotated[int, typer.Option("--against-seed", help="Of the draw of samples to rebuild.")] = 0,
    workers: WorkersOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check a build with code that shares nothing with what wrote it. Exit 0 if clean, 1 with findings.

    Example: longllava validate demo/builds/multi_image --deep
    """
    from longllava.against import check_against
    from longllava.display import SamplesChecked, findings_table, progress_on
    from validators.run import summary
    from validators.run import validate as run

    if "://" not in build and not Path(build).is_dir():
        raise UsageError(f"{build} is no directory")
    with progress_on(stderr()) as progress, check_against(build, against, share, seed, workers, progress) as how:
        findings = run(build, deep=deep, against=how, progress=SamplesChecked(progress))
    if json_output:
        print_json({"build": build, "findings": [f.as_dict() for f in findings], "codes": summary(findings)})
    elif findings:
        stdout().print(findings_table(findings))
    else:
        stdout().print(f"{build}: no findings", highlight=False)
    if findings:
        raise typer.Exit(1)


@app.command("plan-memory")
def plan_memory(
    model: Annotated[str, typer.Option("--model", help="53b, 9b, tiny, or a folder with a config.json.")] = "53b",
    gpu: Annotated[str, typer.Option("--gpu", help="Memory of the GPU, such as 80GB or 79.1GiB.")] = "80GB",
    weights: Annotated[str, typer.Option("--weights", help="bf16, int8-experts or int8.")] = "int8",
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens of a prompt read at a time.")] = 8192,
    json_output: JsonOption = False,
) -> None:
    """Say how many images fit into a GPU's memory and why, and what reading them costs.

    Example: longllava plan-memory --model 53b --gpu 80GB
    """
    from longllava.display import plan_memory_table
    from model.budget import report

    result = report(model, gpu, weights, chunk)
    if json_output:
        print_json(result)
    else:
        plan_memory_table(result, stdout())


@app.command()
def pack(
    builds: Annotated[list[Path], typer.Argument(help="Directories of finished builds.", show_default=False)],
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=1, help="Tokens of a sequence; the recipe's by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the order.")] = 0,
    epoch: Annotated[int, typer.Option("--epoch", min=0, help="Each epoch has an order of its own.")] = 0,
    max_images: Annotated[int | None, typer.Option("--max-images", min=1, help="Most images of a sequence.")] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="How often an epoch reads a build; one for each build.")
    ] = None,
    drop_oversize: Annotated[
        bool, typer.Option("--drop-oversize", help="Leave out samples that fit in no sequence.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the plan there, a Parquet file.")] = None,
    check: Annotated[Path | None, typer.Option("--check", help="Compare with a plan that was written before.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Plan the sequences that training reads, from the indexes alone: fill, tokens by source, images.

    Exit 1 if samples fit in no sequence, or if a plan to check differs.

    Example: longllava pack demo/builds/text demo/builds/multi_image --out plan.parquet
    """
    from formats.blend import blend
    from formats.plan import check_plan, summary, write_plan
    from longllava.display import packing_summary, packing_table

    chosen = blend(builds, weight, sequence_length=sequence_length, seed=seed, max_images=max_images)
    result = summary(chosen, epoch)
    problems = check_plan(check, chosen) if check else []
    if json_output:
        print_json({**result, **({"problems": problems} if check else {})})
    else:
        stdout().print(packing_table(result))
        stdout().print(packing_summary(result), highlight=False)
        if check:
            stdout().print("\n".join(problems) or f"{check}: no differences", markup=False, highlight=False)
    if not drop_oversize:
        chosen.refuse_oversize()
    if out:
        write_plan(out, chosen, epoch)
    if problems:
        raise typer.Exit(1)


def _dry_run(request: Any, json_output: bool) -> None:
    from longllava.display import plan_table, progress_on
    from pipelines.preview import preview

    with progress_on(stderr()) as progress:
        plan = preview(request, progress)
    if json_output:
        print_json(plan)
    else:
        plan_table(plan, stdout())
