"""stats, show, diff and export, run as users run them."""

import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import pytest
import typer
from PIL import Image
from rich.console import Console

from formats.tokens import IGNORED, ChatTokenizer
from longllava.cli import validate
from longllava.commands.look import diff, export, show, stats
from longllava.commands.terminal import print_error, print_json, printable
from longllava.display_samples import blocks, rejects_table, show_sample
from pipelines.opened import OpenBuild, Stored
from pipelines.page import report_page
from pipelines.report import stored_samples


def longllava(*arguments: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "longllava", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def build(demo: Path) -> Path:
    return demo / "builds/multi_image"


def printed(sample: Stored, **options: object) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="truecolor")
    show_sample(sample, console, **options)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_stats_put_builds_side_by_side_and_on_a_page(demo: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    builds = (demo / "builds/text", demo / "builds/align")
    result = longllava("stats", *builds, "--html", page)
    assert result.returncode == 0, result.stderr
    for words in ("side by side", "text by component", "non-commercial", "paper's share", "at least 2 sequences"):
        assert words in result.stdout
    assert page.read_bytes().count(b'data-item="sample"') > 20
    assert longllava("stats", builds[0], "--html", tmp_path / "no/such/folder.html").returncode == 2


def test_tokens_and_labels_are_those_that_the_index_counts(build: Path) -> None:
    result = longllava("show", build, "--component", "mantis", "-n", 2, "--tokens", "--json")
    for sample in json.loads(result.stdout):
        assert len(sample["ids"]) == sample["n_tokens"]
        assert sum(label != IGNORED for label in sample["labels"]) == sample["n_target_tokens"]
    assert "<|reserved_0|> ×144|" in longllava("show", build, "--component", "sub_image", "-n", 1, "--tokens").stdout


def test_rejects_are_shown_by_component_and_number(build: Path) -> None:
    rows = json.loads(longllava("show", build, "--reject", "--component", "videochat2", "-n", 50, "--json").stdout)
    ledger = [json.loads(line) for line in (build / "rejects.jsonl").read_text().splitlines()]
    assert rows == [reject for reject in ledger if reject["component"] == "videochat2"]
    assert "broken-video" in longllava("show", build, "--reject", "-n", 1).stdout
    mixed = longllava("show", build, "some-key", "--reject")
    assert mixed.returncode == 2
    assert "leave out keys" in mixed.stderr


def test_samples_go_to_a_page_and_to_files(build: Path, tmp_path: Path) -> None:
    (sample,) = stored_samples(build, component="videochat2", limit=1)
    key = sample.row["key"]
    page, files = tmp_path / "one.html", tmp_path / "files"
    result = longllava("show", build, key, "--html", page, "--extract", files)
    assert result.returncode == 0, result.stderr
    assert page.read_text().count('data-item="sample"') == 1
    assert len(page.read_bytes()) < 300_000
    assert [p.read_bytes() for p in sorted(files.glob("*.jpg"))] == sample.images
    assert json.loads((files / f"{key}.json").read_text()) == sample.record


def test_pictures_become_blocks_of_their_colours() -> None:
    jpeg = io.BytesIO()
    picture = Image.new("RGB", (336, 336), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 168, 336, 336))
    picture.save(jpeg, "JPEG", quality=100, subsampling=0)
    text = blocks(jpeg.getvalue(), columns=8)
    assert [len(line) for line in text.plain.splitlines()] == [8, 8, 8, 8]
    colours = [str(span.style) for span in text.spans]
    assert colours[0].startswith("#fe0000")
    assert colours[-1].startswith("#0000fe")
    assert blocks(b"no picture").plain == "(no picture)"


def test_hostile_samples_steer_no_terminal(build: Path, tokenizer: ChatTokenizer) -> None:
    (sample,) = stored_samples(build, component="mantis", limit=1)
    bad = "\x1b[2J\x07\x9b31m\u202e[bold]x[/bold]"
    record = json.loads(json.dumps(sample.record))
    record["conversations"][-1]["value"] += bad
    record["images"][0]["role"] += bad
    record["provenance"]["media"] = [bad]
    row = {**sample.row, "key": bad, "id": bad}
    output = printed(Stored(row, record, sample.images), tokenizer=tokenizer, pictures=True)
    for evil in ("\x1b[2J", "\x07", "\x9b", "\u202e"):
        assert evil not in output
    assert "[bold]x[/bold]" in output
    console = Console(file=io.StringIO(), width=200)
    console.print(rejects_table([dict.fromkeys(("uid", "component", "reason", "detail", "replaced_by"), bad)]))
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert printable("a\nb\tc\u202e") == "a\nb\\x09c\\x202e"


EVIL = ("\x1b", "\x07", "\x9b", "\u202e", "\x7f")
HOSTILE = "\x1b[2J\x07\x9b31m\u202e\x7f[bold]x[/bold] [/nothing] :smile:"


@pytest.fixture
def hostile(demo: Path, tmp_path: Path) -> Path:
    """A build whose files say what no build of ours would."""
    out = tmp_path / "hostile"
    shutil.copytree(demo / "builds/text", out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["recipe"] |= {"name": HOSTILE, "description": HOSTILE}
    components = manifest["components"]
    components[HOSTILE] = {**next(iter(components.values())), "rejects": {HOSTILE: 1}, "dropped": {HOSTILE: 2}}
    manifest["recipe"]["components"][HOSTILE] = next(iter(manifest["recipe"]["components"].values()))
    for source in manifest["sources"].values():
        source |= {"licence": HOSTILE, "hub_id": HOSTILE}
    (out / "manifest.json").write_text(json.dumps(manifest))
    reject = dict.fromkeys(("uid", "component", "reason", "detail", "replaced_by", "thumbnail"), HOSTILE)
    (out / "rejects.jsonl").write_text(json.dumps(reject) + "\n")
    return out


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_builds_steer_no_terminal(
    hostile: Path, demo: Path, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    stats([str(hostile)], json_output=as_json)
    show(str(hostile), reject=True, json_output=as_json)
    with pytest.raises(typer.Exit):
        diff(str(hostile), str(demo / "builds/align"), json_output=as_json)
    with pytest.raises(typer.Exit):
        validate(str(hostile), json_output=as_json)
    said = capsys.readouterr().out
    assert [evil for evil in EVIL if evil in said] == []
    for words in ("[bold]x[/bold]", "[/nothing]", ":smile:"):
        assert said.count(words) > 5
    print_error(HOSTILE)
    assert not any(evil in capsys.readouterr().err for evil in EVIL)


def test_json_that_is_printed_reads_as_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: ["é", "图", "\U000e0001", "\ud800", HOSTILE]}
    print_json(value)
    said = capsys.readouterr().out
    assert json.loads(said) == value
    assert "图" in said
    assert not any(evil in said for evil in EVIL)


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name == "src"]


def test_a_hostile_build_has_a_harmless_page(hostile: Path, tmp_path: Path) -> None:
    manifest = json.loads((hostile / "manifest.json").read_text())
    script = "\"></script><script>alert(1)</script><img src=x onerror=alert(1)>'$(id)`id`"
    text = json.dumps(manifest).replace(json.dumps(HOSTILE)[1:-1], json.dumps(script)[1:-1])
    (hostile / "manifest.json").write_text(text)
    reject = dict.fromkeys(("uid", "component", "reason", "detail", "replaced_by", "thumbnail"), script)
    (hostile / "rejects.jsonl").write_text(json.dumps(reject) + "\n")
    page = report_page([OpenBuild(hostile)]).decode()
    found = Elements()
    found.feed(page)
    assert found.names.isdisjoint({"svg", "iframe", "object", "embed", "link", "base"})
    assert not [name for name in found.attributes if name.startswith("on")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)
    assert page.count("<script>") == 2
    assert page.count("alert(1)") > 10
    for command in re.findall(r'<code>duckdb -c "(.*?)"</code>', page):
        assert not set(html.unescape(command)) & set('"`\\')
        assert "$(" not in command


def test_every_command_takes_a_url(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = demo / "builds/align", "memory://bucket/align"
    memory = fsspec.filesystem("memory")
    memory.put(str(here), "/bucket/align", recursive=True)
    try:
        stats([there, str(here)], html=tmp_path / "both.html")
        said = capsys.readouterr().out
        assert said.count("align by component") == 2
        show(there, component="allava", n=1)
        assert "trained on:" in capsys.readouterr().out
        show(there, reject=True)
        assert "media-missing" in capsys.readouterr().out
        diff(str(here), there)
        assert capsys.readouterr().out.strip() == "the same"
        export(there, "llava", tmp_path / "llava")
        assert len(list(tmp_path.glob("llava/images/*"))) == 600
        validate(there)
        assert "memory://bucket/align: no findings" in capsys.readouterr().out
    finally:
        memory.rm("/bucket", recursive=True)


def test_diff_tells_same_from_different_by_its_exit_code(demo: Path, tmp_path: Path) -> None:
    text, align = demo / "builds/text", demo / "builds/align"
    copy = tmp_path / "copy"
    shutil.copytree(text, copy)
    same = longllava("diff", text, copy)
    assert (same.returncode, same.stdout.strip()) == (0, "the same")
    other = longllava("diff", text, align, "--json")
    assert other.returncode == 1
    found = json.loads(other.stdout)
    assert found["counts"]["allava"] == {"came": {"recipe": 498}}
    assert "and 858 more" in longllava("diff", text, align).stdout
    assert longllava("diff", text, tmp_path / "nowhere").returncode == 2


def test_export_says_what_to_do_next(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "parquet"
    result = longllava("export", demo / "builds/text", "--to", "hf", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "278 samples" in result.stdout
    assert "load_dataset(" in result.stdout
    again = longllava("export", demo / "builds/text", "--to", "hf", "--out", out)
    assert again.returncode == 2
    assert "is there already" in again.stderr
