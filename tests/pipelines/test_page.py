"""pipelines.page and pipelines.card: what a build says of itself to people."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml

from formats.shard import ShardWriter
from longllava.commands.look import diff, export, show, stats
from pipelines.card import card
from pipelines.gallery import draw, drawn_rows
from pipelines.opened import OpenBuild
from pipelines.page import REPORT, report_page
from pipelines.report import FIGURES, figures_query, statistics, stored_samples
from pipelines.tables import words
from validators.run import validate

MakeBuild = Callable[..., Path]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>{{ 7*7 }}\x1b[31m\u202e"


@pytest.fixture(scope="module")
def build(demo: Path) -> Path:
    return demo / "builds/multi_image"


@pytest.fixture(scope="module")
def page(build: Path) -> str:
    return (build / REPORT).read_text(encoding="utf-8")


def tables(page: str) -> dict[str, list[list[str]]]:
    """Cells of every named table of the page, headings first."""
    found = {}
    for name, body in re.findall(r'<table data-table="(\w+)">(.*?)</table>', page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        found[name] = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", html.unescape(row)) for row in rows]
    return found


FIGURES_SHOWN = {words(name) for name in FIGURES} - {"bytes"}
TABLES = {
    "sources": {"records", "usable", "rejected"},
    "filtered": {"records"},
    "components": {"pool", "asked", "drawn", "kept", "rejected", "short"},
    "reasons": {"records"},
    "component": FIGURES_SHOWN,
    "source": FIGURES_SHOWN,
    "mix": {"kept", "share"},
    "licences": {"samples"},
}
"""The columns of each table that count something."""
NOT_COUNTED = {"asked", "paper", "paper's share", "hub id", "licence", "non-commercial"}
"""Other columns; those of the mix are the recipe's and the paper's numbers."""


def cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:,}"


def commands(page: str) -> list[str]:
    """The SQL that the page offers, as a person would copy it out of the browser."""
    return [html.unescape(found) for found in re.findall(r'<code>duckdb -c "(.*?)"</code>', page)]


@pytest.mark.parametrize("name", ["text", "align", "single_image", "multi_image"])
def test_every_build_of_the_demo_has_a_page_below_five_megabytes(demo: Path, name: str) -> None:
    assert 900_000 < (demo / "builds" / name / REPORT).stat().st_size < 5_000_000


def test_a_page_names_no_address_to_load_from(page: str) -> None:
    loading = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|@import|url\(([^)]*)\)""", page.split("<script>")[0])
    assert {found[0].partition(",")[0] for found in loading} <= {
        "data:image/jpeg;base64",
        "#content",
        "#summary",
        "#plots",
        "#samples",
        "#rejects",
    }


def test_the_same_build_gives_the_same_page(build: Path, page: str) -> None:
    assert report_page([OpenBuild(build)]).decode() == page
    assert report_page([OpenBuild(build)]) == report_page([OpenBuild(str(build) + "/")])


def computed(command: str, build: Path) -> list[dict[str, object]]:
    """What a line of SQL on a page gives, run where the page lies."""
    query = re.sub(r"'(index\.parquet|rejects\.jsonl|manifest\.json)'", rf"'{build}/\1'", command)
    result = duckdb.sql(query)
    return [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]


def test_every_number_of_the_pages_tables_is_one_line_of_sql(build: Path, page: str) -> None:
    found = tables(page)
    lines = re.findall(r'<table data-table="(\w+)">.*?<code>duckdb -c "(.*?)"</code>', page, re.DOTALL)
    assert [name for name, _ in lines] == list(found) == [*TABLES]
    for name, line in lines:
        heading, *rows = found[name]
        keys = 2 if name in ("filtered", "reasons") else 1
        assert set(heading[keys:]) - TABLES[name] <= NOT_COUNTED, name
        results = [*computed(html.unescape(line), build)]
        expected = {tuple(result.values())[:keys]: result for result in results}
        rows = rows[:-1] if name in ("component", "source") else rows  # sums, which the next test looks at
        assert len(rows) == len(expected) > 0, name
        for row in rows:
            values = {words(column): cell(value) for column, value in expected[tuple(row[:keys])].items()}
            numbers = dict(zip(heading, row, strict=True))
            assert {column: numbers[column] for column in TABLES[name]} == {c: values[c] for c in TABLES[name]}, name


@pytest.mark.parametrize("by", ["component", "source"])
def test_the_sums_below_a_table_are_of_the_whole_index(build: Path, page: str, by: str) -> None:
    *_, total = tables(page)[by]
    (row,) = computed(figures_query("'index.parquet'"), build)
    assert total == ["all", *(cell(row[name]) for name in FIGURES if name != "bytes")]
    assert total[1] == "750"


def test_the_numbers_at_the_top_are_one_line_of_sql(build: Path, page: str) -> None:
    names = re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page.split("</dl>")[0])
    (row,) = computed(commands(page)[0], build)
    assert [value.removeprefix("≥ ") for _, value in names] == [cell(value) for value in row.values()]


def plots(page: str) -> dict[str, list[dict[str, object]]]:
    """What each plot shows."""
    found = re.findall(r'data-for="plot-0-(\w+)">(.*?)</script>', page)
    return {name: json.loads(html.unescape(spec))["data"]["values"] for name, spec in found}


def test_the_plots_show_what_their_lines_of_sql_give(build: Path, page: str) -> None:
    lines = re.findall(r'data-plot="(\w+)"[^>]*>.*?<code>duckdb -c "(.*?)"</code>', page, re.DOTALL)
    given = {name: computed(html.unescape(line), build) for name, line in lines}
    values = plots(page)
    assert list(values) == list(given) == ["mix", "lengths", "images", "tokens", "sizes", "aspects", "rejects"]
    for name in ("images", "rejects"):
        expected = [{column: row[column] for column in values[name][0]} for row in given[name]]
        assert sorted(map(str, values[name])) == sorted(map(str, expected))
    for name, units in {"mix": ("samples", "tokens"), "tokens": ("image", "trained_on", "other_text")}.items():
        counts = sorted(int(row["count"] if name == "mix" else row["tokens"]) for row in values[name])
        assert counts == sorted(int(row[unit]) for row in given[name] for unit in units)
    for name in ("lengths", "sizes", "aspects"):
        assert [row["samples"] for row in values[name]] == [row["samples"] for row in given[name]]
    assert sum(row["samples"] for row in values["lengths"]) == 750
    pictures = computed("SELECT count(width) AS n FROM 'index.parquet'", build)[0]["n"]
    assert (
        sum(row["samples"] for row in values["sizes"]) == sum(row["samples"] for row in values["aspects"]) == pictures
    )


def test_the_bins_of_the_plots_are_where_they_say(build: Path, page: str) -> None:
    values = plots(page)

    def count(where: str, row: Mapping[str, object]) -> object:
        query = f"SELECT count(*) AS n FROM 'index.parquet' WHERE {where} AND component = '{row['component']}'"
        return computed(query, build)[0]["n"]

    for row in values["lengths"]:
        assert count(f"n_tokens BETWEEN {row['from']} AND {row['to']}", row) == row["samples"], row
    for row in values["sizes"]:
        sides = {name: str(row[name + "s"]).replace(",", "").split(" to ") for name in ("width", "height")}
        spans = [f"{name} BETWEEN {found[0]} AND {found[-1]}" for name, found in sides.items()]
        assert count(" AND ".join(spans), row) == row["samples"], row
    for row in values["aspects"]:
        across, down = str(row["aspect"]).split(" : ")
        near = f"abs(log2(width / height) - log2({across}::DOUBLE / {down})) < 0.125"
        assert count(near, row) == pytest.approx(row["samples"], abs=2), row  # its name is rounded


def test_the_size_of_a_sample_is_that_of_its_largest_picture(build: Path) -> None:
    for sample in stored_samples(build, limit=10_000):
        sizes = [tuple(image["source_size"]) for image in sample.record["images"]]
        shown = (sample.row["width"], sample.row["height"])
        assert shown == max(sizes, key=lambda size: size[0] * size[1], default=(None, None))


def test_what_was_drawn_is_what_was_kept_and_rejected(page: str) -> None:
    found = tables(page)
    reasons: dict[str, int] = {}
    for _, component, records in found["reasons"][1:]:
        reasons[component] = reasons.get(component, 0) + int(records)
    heading, *rows = found["components"]
    for row in rows:
        counts = dict(zip(heading[1:], (int(value.replace(",", "")) for value in row[1:]), strict=True))
        assert counts["asked"] == counts["kept"] + counts["short"]
        assert counts["drawn"] == counts["kept"] + counts["rejected"]
        assert counts["rejected"] == reasons.get(row[0], 0)
    assert sum(reasons.values()) > 0


def test_the_draw_takes_some_of_each_component_and_keeps_to_its_budget(build: Path) -> None:
    opened = OpenBuild(build)
    all_drawn = draw(opened, 10_000_000)
    assert {exhibit.row["component"] for exhibit in all_drawn} == set(opened.manifest["components"])
    some = draw(opened, 100_000)
    assert {exhibit.row["component"] for exhibit in some} == set(opened.manifest["components"])
    assert sum(exhibit.weight for exhibit in some) < sum(exhibit.weight for exhibit in all_drawn) / 2
    assert drawn_rows(opened, 3) == {name: rows[:3] for name, rows in drawn_rows(opened, 5).items()}


def test_a_shown_sample_has_its_text_in_order_and_an_image_for_each(build: Path) -> None:
    stored = {sample.row["key"]: sample for sample in stored_samples(build, limit=10_000)}
    for exhibit in draw(OpenBuild(build), 10_000_000):
        sample = stored[exhibit.row["key"]]
        pieces = [piece for turn in exhibit.turns for piece in turn.pieces]
        if any(piece.kind == "gap" or "shown" in piece.note for piece in pieces):
            continue
        assert sum(len(piece.images) for piece in pieces) == len(sample.images)
        said = "".join(piece.text for piece in pieces if piece.kind == "text")
        plain = "".join(turn["value"] for turn in sample.record["conversations"])
        assert said.replace("\n", "") == re.sub(r"</?(?:img|image|vid)>|<t>|\n", "", plain)
        assert [turn.trained for turn in exhibit.turns] == [t["from"] == "gpt" for t in sample.record["conversations"]]


def test_hostile_text_stays_text(make_build: MakeBuild) -> None:
    rows = [
        (HOSTILE, HOSTILE, None),
        (HOSTILE, "Yes.", (300, 200)),
        ("x", "y", b"\xff\xd8\xff<script>window.hacked=4</script>"),
    ]
    out = make_build(rows, description=HOSTILE)
    page = (out / REPORT).read_text(encoding="utf-8")
    assert page.count("<script>") == 2
    assert "window.hacked" in page
    outside = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert set(re.findall(r"<(script|svg|iframe|object|embed)\b", outside)) == set()
    assert all(" onerror" not in tag and " onload" not in tag for tag in re.findall(r"<[a-z][^<>]*>", outside))
    assert "{{ 7*7 }}" in page
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["pretty_name"] == "LongLLaVA small"
    assert "<script>" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("rows", "samples"),
    [
        ([("x", "y", b"\xff\xd8\xff no picture")] * 3, 0),
        ([("Is it red?", "Yes.", (400, 200))], 1),
        ([("Is it red?", "Yes.", None)] * 9, 9),
    ],
)
def test_no_sample_one_sample_and_one_component_work(
    make_build: MakeBuild,
    rows: list[tuple[str, str, object]],
    samples: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = make_build(rows)
    assert validate(str(out), deep=True) == []
    assert statistics(out)["total"]["samples"] == samples
    page, text = (out / REPORT).read_text(), (out / "README.md").read_text()
    assert page.count('data-item="sample"') == min(samples, 12)
    assert page.count('data-item="reject"') == len(rows) - samples
    assert ("This build holds no samples" in page) == (samples == 0)
    assert ("It holds no samples" in text) == (samples == 0)
    assert (out / ".nv-meta").exists() == (samples > 0)
    stats([str(out), str(out)], html=tmp_path / "stats.html")
    said = capsys.readouterr().out
    assert "side by side" in said
    assert f"at least {min(samples, 1)} sequences" in said
    assert (tmp_path / "stats.html").read_text().count('data-item="sample"') == 2 * min(samples, 12)
    show(str(out), html=tmp_path / "show.html", extract=tmp_path / "files", tokens=True)
    assert ("trained on:" in capsys.readouterr().out) == (samples > 0)
    assert (tmp_path / "show.html").read_text().count('data-item="sample"') == min(samples, 3)
    assert len(list(tmp_path.glob("files/*.json"))) == min(samples, 3)
    show(str(out), reject=True)
    assert ("nothing was rejected" in capsys.readouterr().out) == (samples > 0)
    diff(str(out), str(out))
    assert capsys.readouterr().out.strip() == "the same"
    for to in ("hf", "llava", "energon"):
        export(str(out), to, tmp_path / to)
        assert f"{samples} samples" in capsys.readouterr().out
    assert sum(pq.read_metadata(file).num_rows for file in tmp_path.glob("hf/data/*.parquet")) == samples
    assert len(json.loads((tmp_path / "llava/data.json").read_text())) == samples
    assert len(list(tmp_path.glob("energon/shards/*.tar.idx"))) == -(-samples // 8)


def test_a_card_has_front_matter_mix_and_licences(build: Path) -> None:
    text = (build / "README.md").read_text(encoding="utf-8")
    assert card(OpenBuild(build)).decode() == text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other"
    assert front["size_categories"] == ["n<1K"]
    assert front["task_categories"] == ["image-text-to-text", "video-text-to-text", "text-generation"]
    assert "| mantis | mantis | drawn | 200 | 26.7% | 699 |" in text
    assert (
        "73 samples (9.7%) come from sets whose licence excludes commercial use: evol_instruct, sharegpt4video." in text
    )


def test_a_build_of_one_licence_states_it(make_build: MakeBuild) -> None:
    out = make_build([("Is it red?", "Yes.", None)])
    text = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "cc-by-4.0"
    assert "None of these licences excludes commercial use" in text


def test_the_cards_rebuild_command_makes_the_same_shards(demo: Path, tmp_path: Path) -> None:
    build = demo / "builds/text"
    text = (build / "README.md").read_text(encoding="utf-8")
    rebuild = text.split("## Rebuild")[1]
    first, second = (line.strip() for line in rebuild.splitlines() if line.startswith("    "))
    copy = tmp_path / "text"
    shutil.copytree(build, copy)
    subprocess.run([sys.executable, *shlex.split(first)[1:]], cwd=copy, check=True)
    out = tmp_path / "again"
    words = shlex.split(second.replace("DATA", str(demo / "data")).replace("OUT", str(out)))
    line = [sys.executable, "-m", *words, "--catalog", str(tmp_path / "catalog"), "--workers", "2"]
    subprocess.run(line, cwd=copy, check=True, capture_output=True)
    shards = [json.loads((folder / "manifest.json").read_text())["shards"] for folder in (build, out)]
    assert shards[0] == shards[1]


def test_the_cards_webdataset_lines_run_as_they_stand(demo: Path) -> None:
    build = demo / "builds/align"
    code = (
        (build / "README.md").read_text().split("Plain [webdataset]")[1].split("    import", 1)[1].split("\n[Mega")[0]
    )
    lines = ["import" + code.splitlines()[0], *(line.removeprefix("    ") for line in code.splitlines()[1:])]
    script = "\n".join(lines) + "\nprint(len(images), images[0].size)\n"
    result = subprocess.run([sys.executable, "-c", script], cwd=build, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1 (336, 336)"


def test_a_damaged_picture_does_not_stop_a_page(make_build: MakeBuild, tmp_path: Path) -> None:
    out = make_build([("Is it red?", "Yes.", (400, 200))])
    (sample,) = stored_samples(out)
    with ShardWriter(out / "shards" / sample.row["shard"]) as shard:
        shard.add(
            sample.row["key"], json.dumps(sample.record, separators=(",", ":")).encode(), [bytes(len(sample.images[0]))]
        )
        shard.finish()
    assert b'src="data:,"' in report_page([OpenBuild(out)])
