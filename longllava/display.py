"""What commands show: tables on stdout, progress on stderr (a live bar on a terminal, plain lines elsewhere)."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from pipelines.progress import NOTHING, Progress
from validators.findings import Finding

_SECONDS_BETWEEN_LINES = 5.0


class _Counting(Progress):
    """Adds up what a stage reports."""

    def __init__(self) -> None:
        self._begin("", None, "")

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self._begin(name, total, unit)

    def advance(self, amount: int, *, images: int = 0, rejected: Mapping[str, int] = NOTHING, new: bool = True) -> None:
        self.done += amount
        self.done_before += 0 if new else amount
        self.images += images if new else 0
        self.rejected.update(rejected)

    def _begin(self, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.done_before = self.images = 0
        self.rejected: Counter[str] = Counter()
        self.started = time.monotonic()

    def details(self) -> str:
        """Images a second and rejects by reason, if there are any."""
        parts = []
        if self.images:
            parts.append(f"{self.images / max(self.seconds, 1e-3):,.0f} images/s")
        if self.rejected.total():
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.most_common(4) if count)
            parts.append(f"{self.rejected.total():,} rejected ({reasons})")
        return ", ".join(parts)

    @property
    def seconds(self) -> float:
        """How long this stage has been at work."""
        return time.monotonic() - self.started

    def left(self) -> float | None:
        """Seconds until the stage is done, at the speed of what this run has done; None if nobody can know."""
        new = self.done - self.done_before
        return None if self.total is None or not new else self.seconds / new * max(0, self.total - self.done)


class _Live(_Counting):
    """A bar on a terminal."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar
        self._task: Any = None

    def stage(self, name: str, total: int | None, unit: str) -> None:
        super().stage(name, total, unit)
        self._task = self._bar.add_task(name, total=total, details="", unit=unit, left="")

    def advance(self, amount: int, *, images: int = 0, rejected: Mapping[str, int] = NOTHING, new: bool = True) -> None:
        super().advance(amount, images=images, rejected=rejected, new=new)
        left = self.left()
        self._bar.update(self._task, advance=amount, details=self.details(), left="" if left is None else _clock(left))

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False)


class _Plain(_Counting):
    """A line every few seconds, for logs."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._last = 0.0

    def advance(self, amount: int, *, images: int = 0, rejected: Mapping[str, int] = NOTHING, new: bool = True) -> None:
        super().advance(amount, images=images, rejected=rejected, new=new)
        complete = self.total is not None and self.done >= self.total
        if complete or time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            of = f"/{self.total:,}" if self.total is not None else ""
            left, details = self.left(), self.details()
            line = f"{self.name}: {self.done:,}{of} {self.unit}, {self.seconds:.0f} s"
            line += f", {_clock(left)} left" if left else ""
            self.note(f"{line}, {details}" if details else line)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """Progress in the form that suits where stderr goes."""
    if not console.is_terminal:
        yield _Plain(console)
        return
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
        TextColumn("{task.fields[details]}"),
    )
    with Bar(*columns, console=console) as bar:
        yield _Live(bar)


class SamplesChecked:
    """Draws what `validators.run.validate` reports as one stage of a progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done: int | None = None

    def __call__(self, shard: str, done: int, total: int) -> None:
        """`done` of `total` samples are checked; `shard` is at work."""
        if self._done is None:
            self._progress.stage("validate", total, "samples")
            self._done = 0
        self._progress.advance(done - self._done)
        self._done = done


def build_table(manifest: Mapping[str, Any]) -> Table:
    """A build in one table: what was asked for and what came of it."""
    table = Table(title=f"build {manifest['recipe']['name']}", title_justify="left")
    for name in ("component", "dropped", "asked", "kept", "short", "rejected", "images", "tokens", "targets"):
        table.add_column(name, justify="left" if name == "component" else "right")
    for name, c in manifest["components"].items():
        numbers = [sum(c["dropped"].values())]
        numbers += [c[key] for key in ("asked", "kept", "short", "rejected", "images", "tokens", "target_tokens")]
        table.add_row(name, *(f"{n:,}" for n in numbers))
    totals = manifest["totals"]
    asked = sum(c["asked"] for c in manifest["components"].values())
    dropped = sum(sum(c["dropped"].values()) for c in manifest["components"].values())
    numbers = [dropped, asked, totals["samples"], asked - totals["samples"], totals["rejected"], totals["images"]]
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in (*numbers, totals["tokens"], totals["target_tokens"])))
    return table


def build_summary(manifest: Mapping[str, Any]) -> str:
    """The lines below the table: size, speed, drops by step and rejects by reason."""
    totals, seconds = manifest["totals"], manifest["environment"]["seconds"]
    lines = [
        f"{len(manifest['shards'])} shards, {totals['bytes'] / 1e6:,.1f} MB, {seconds:,.1f} s,"
        f" {totals['images'] / max(seconds, 0.1):,.0f} images/s"
    ]
    for title, key in (("dropped by filters", "dropped"), ("rejected", "rejects")):
        reasons: Counter[str] = Counter()
        for component in manifest["components"].values():
            reasons.update(component[key])
        if reasons:
            lines.append(f"{title}: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items())))
    return "\n".join(lines)


def sources_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The sources, then for each what is missing and how to get it."""
    table = Table("source", "hub id", "licence", "on disk")
    for row in rows:
        licence = row["licence"] + (" (non-commercial)" if row["non_commercial"] else "")
        table.add_row(row["name"], row["hub_id"], licence, _presence(row))
    console.print(table)
    for row in rows:
        missing = [e for e in row["expected"] if not e.get("found", True)]
        for expected in missing:
            need = "missing" if expected["required"] else "absent (optional)"
            console.print(f"{row['name']}: {need}: {expected['pattern']}: {expected['what']}", highlight=False)
        if missing:
            for command in row["fetch"]:
                console.print(f"    {command}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _presence(row: Mapping[str, Any]) -> str:
    required = [e for e in row["expected"] if e["required"]]
    if "found" not in required[0]:
        return "?"
    found = sum(e["found"] for e in required)
    return "complete" if found == len(required) else f"{found} of {len(required)}" if found else "absent"


def catalogs_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """What ingest has read."""
    table = Table("source")
    for name in ("files", "records", "usable", "rejected", "refusals", "e-mails", "phones", "cards", "other language"):
        table.add_column(name, justify="right")
    for name, summary in summaries.items():
        numbers = [len(summary["files"]), summary["records"], summary["usable"], summary["rejected"]]
        numbers += summary["marked"].values()
        table.add_row(name, *(f"{n:,}" for n in numbers))
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """What validate found, the first hundred."""
    table = Table("code", "file", "key", "detail", title=f"{len(findings):,} findings", title_justify="left")
    for finding in findings[:100]:
        table.add_row(finding.code, finding.file or "", finding.key or "", Text(finding.detail))
    return table


def plan_table(plan: Mapping[str, Any], console: Console) -> None:
    """A dry run: what would be drawn, and an estimate of the whole."""
    table = Table(title=f"plan of {plan['recipe']}", title_justify="left")
    for name in ("component", "origin", "asked", "filtered", "dropped", "pool", "drawn", "short", "images", "tokens"):
        table.add_column(name, justify="left" if name in ("component", "origin") else "right")
    for name, c in plan["components"].items():
        numbers = [c["asked"], sum(c["filtered"].values()), sum(c["dropped"].values())]
        numbers += [c["pool"], c["drawn"], c["short"]]
        estimates = [f"~{c[key]:,}" if c[key] is not None else "?" for key in ("images", "tokens")]
        table.add_row(name, c["origin"], *(f"{n:,}" for n in numbers), *estimates)
    console.print(table)
    if any(c["dropped"] or c["dropped_pictures"] for c in plan["components"].values()):
        console.print(drops_table(plan))
    for name, c in plan["components"].items():
        if c["drop_share"] > c["max_drop"]:
            what = f"{name}: filters drop {c['drop_share']:.1%}, but max_drop is {c['max_drop']:.1%}"
            console.print(f"{what}; the build would stop", style="bold red")
        if c["short"]:
            console.print(f"{name} is short by {c['short']:,} (on_short: {c['on_short']})", style="bold red")
    e = plan["estimate"]
    if e["probed"]:
        console.print(
            f"estimated from {e['probed']} samples, of which {e['rejected']} were rejected: {e['images']:,} images,"
            f" {e['tokens']:,} tokens, {e['bytes'] / 1e9:,.2f} GB in {e['shards']:,} shards,"
            f" {e['seconds'] / 60:,.1f} min",
            highlight=False,
        )


def drops_table(plan: Mapping[str, Any]) -> Table:
    """What each step of a recipe's filters drops; pictures are known of the probed samples only."""
    table = Table(title="dropped by filters", title_justify="left")
    for name in ("component", "step", "records", "share"):
        table.add_column(name, justify="left" if name in ("component", "step") else "right")
    for name, c in plan["components"].items():
        total = max(c["pool"] + sum(c["dropped"].values()), 1)
        for step, count in sorted(c["dropped"].items(), key=lambda item: -item[1]):
            table.add_row(name, step, f"{count:,}", f"{count / total:.1%}")
        for step, count in c["dropped_pictures"].items():
            table.add_row(name, step, f"{count:,} of those probed", "")
    return table


def plan_memory_table(result: Mapping[str, Any], console: Console) -> None:
    """Where a GPU's memory goes, what fits into the rest, and what reading images costs."""
    plan, gib = result["memory"], 1 << 30
    table = Table("memory", "GiB", title=f"{result['model']}, weights in {result['weights']}", title_justify="left")
    rows = {f"weights: {kind}": size for kind, size in plan["weights"].items()} | {
        "one chunk of the prompt (estimate)": plan["chunk"],
        "one batch of images (estimate)": plan["images_at_once"],
        "Mamba states": plan["state"],
        "driver and fragments (assumed)": plan["reserve"],
        f"keys and values of {plan['tokens']:,} tokens": plan["tokens"] * plan["kv_per_token"],
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / gib:.2f}")
    if plan["fixed"] > plan["gpu"]:
        table.add_row("needed", f"{plan['fixed'] / gib:.2f}", style="bold")
        table.add_row("the GPU has", f"{plan['gpu'] / gib:.2f}", style="bold")
    else:
        table.add_row("all", f"{plan['gpu'] / gib:.2f}", style="bold")
    console.print(table)
    fit = f"{plan['images']:,} images of {plan['tokens_per_image']} tokens fit into memory"
    console.print(_too_small(result) if result["instead"] else fit, highlight=False)
    console.print(f"{plan['images_in_context']:,} fit into the base model's context", highlight=False)
    cost = Table("images", "paper's counting", "exact", title="operations of reading them", title_justify="left")
    for images, flops in result["flops"].items():
        cost.add_row(images, f"{flops['paper'] / 1e15:.4f} P", f"{flops['exact'] / 1e15:.4f} P")
    console.print(cost)


def _too_small(result: Mapping[str, Any]) -> str:
    """Why not one image fits, and what would hold some."""
    plan, gib = result["memory"], 1 << 30
    weights, has = sum(plan["weights"].values()) / gib, plan["gpu"] / gib
    if weights > has:
        why = f"the weights alone, {weights:.2f} GiB in {result['weights']}, are more than the GPU's {has:.2f} GiB"
    elif plan["fixed"] > plan["gpu"]:
        why = f"the weights leave {has - weights:.2f} GiB, too little to read a chunk in"
    else:
        why = f"there is room for {plan['tokens']:,} tokens, too few for an image, a question and an answer"
    weights, gpu = result["instead"]["weights"], result["instead"]["gpu"]
    ways = ([f"--weights {weights} here"] if weights else []) + ([f"a GPU of {gpu} with these"] if gpu else [])
    advice = f"what fits: {' or '.join(ways)}" if ways else "no GPU that is sold holds it"
    return f"no image fits: {why}\n{advice}" + ("" if weights else "; no --weights is small enough here")


def packing_table(summary: Mapping[str, Any]) -> Table:
    """What an epoch reads of each source."""
    table = Table(title=f"epoch {summary['epoch']}", title_justify="left")
    table.add_column("source")
    for name in ("samples", "images", "tokens", "share", "off by at most"):
        table.add_column(name, justify="right")
    for name, row in summary["by_source"].items():
        numbers = (f"{row[key]:,}" for key in ("samples", "images", "tokens"))
        deviation = row["largest_deviation_in_100_sequences"]
        table.add_row(name, *numbers, f"{row['share']:.2%}", "-" if deviation is None else f"{deviation:.2%}")
    return table


def packing_summary(summary: Mapping[str, Any]) -> str:
    """The lines below the table: sequences, fill, images, what is left out or read twice."""
    samples, images = summary["samples_per_sequence"], summary["images_per_sequence"]
    lines = [
        f"{summary['sequences']:,} sequences of {summary['sequence_length']:,} tokens, {summary['fill']:.2%} full;"
        f" {samples['mean']:,} samples and {images['mean']:,} images each, at most {images['max']:,} images"
    ]
    if summary["oversize"]["samples"]:
        lines.append(f"{summary['oversize']['samples']:,} samples fit in no sequence")
    if summary["records_in_several_builds"]:
        lines.append(f"{summary['records_in_several_builds']:,} upstream records are in more than one of the builds")
    return "\n".join(lines)
