"""What do Ray, planning and tar writing cost, and what does a second worker bring?

    python benchmarks/build.py [--pictures 1200] [--texts 20000] [--repeats 3]

Builds, each in a fresh process and interleaved: PICTURES JPEGs of 2.5 megapixels with one and with two workers (media
work), and TEXTS short conversations without media (everything but media work). Seconds are those of the manifest, from
reading annotations to the report; the driver's share is its CPU time over the CPU time that its workers could use.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import measured, median
from rates import scene

from pipelines.demo.tokenizer import train_tokenizer

BUILD = """
import sys, json, resource
from longllava.cli import app
app(["build", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3], "--catalog", sys.argv[4],
     "--workers", sys.argv[5], "--json"], standalone_mode=False)
manifest = json.load(open(sys.argv[3] + "/manifest.json"))
used = resource.getrusage(resource.RUSAGE_SELF)
driver = used.ru_utime + used.ru_stime
print(json.dumps({"seconds": manifest["environment"]["seconds"], "driver_s": driver, **manifest["totals"]}))
"""
_SCENES = 24  # different ones; the rest are links


def write_pictures(folder: Path, records: int) -> None:
    """Questions about pictures in LLaVA-1.5's form."""
    media = folder / "llava15" / "coco"
    media.mkdir(parents=True)
    rows = []
    for i in range(records):
        picture = media / f"{i}.jpg"
        if i < _SCENES:
            scene(1936, 1288, i).save(picture, quality=90)
        else:
            picture.hardlink_to(media / f"{i % _SCENES}.jpg")
        turns = [{"from": "human", "value": f"<image>\nWhat is in {i}?"}, {"from": "gpt", "value": "A scene."}]
        rows.append({"id": i, "image": f"coco/{i}.jpg", "conversations": turns})
    (folder / "llava15" / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))


def write_texts(folder: Path, records: int) -> None:
    """Short conversations in Evol-Instruct's form."""
    target = folder / "evol_instruct" / "allava_text"
    target.mkdir(parents=True)
    rows = [
        {
            "idx": str(i),
            "conversations": [
                {"from": "human", "value": f"What is {i} plus {i}? Explain in a sentence."},
                {"from": "gpt", "value": f"{i} plus {i} is {2 * i}, since adding a number to itself doubles it."},
            ],
        }
        for i in range(records)
    ]
    (target / "Evol-Instruct-GPT4-Turbo-143K.json").write_text(json.dumps(rows))


def write_recipe(folder: Path, name: str, source: str, samples_per_shard: int) -> Path:
    """All of one source."""
    components = {name: {"source": source, "count": "all"}}
    recipe = {"name": name, "tokenizer": "tokenizer", "samples_per_shard": samples_per_shard, "components": components}
    (folder / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / f"{name}.yaml"


def main() -> None:
    """Prints one JSON object with medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, default=1_200)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        write_texts(data, options.texts)
        write_pictures(data, options.pictures)
        train_tokenizer(["What is 0 1 2 3 4 5 6 7 8 9 plus? Explain in a sentence."], folder / "tokenizer")
        pictures = write_recipe(folder, "pictures", "llava15", 20)
        texts = write_recipe(folder, "texts", "evol_instruct", 1_000)
        cases = {
            "pictures, 1 worker": (pictures, data, 1),
            "pictures, 2 workers": (pictures, data, 2),
            "texts, 2 workers": (texts, data, 2),
        }
        runs: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
        for repeat in range(options.repeats):
            for case, (path, data, workers) in cases.items():
                out = folder / f"out-{case}-{repeat}".replace(" ", "")
                run = measured(BUILD, path, data, out, out.with_suffix(".catalog"), workers)
                runs[case].append({**run, **run["result"]})
    result = {
        case: {
            "samples": measurements[0]["samples"],
            "images": measurements[0]["images"],
            "build_s": median(measurements, "seconds"),
            "driver_cpu_s": median(measurements, "driver_s"),
            "wall_with_ray_start_s": median(measurements, "wall_s"),
        }
        for case, measurements in runs.items()
    }
    one, two, many = (result[case] for case in cases)
    result["ratios"] = {
        "speed_up_of_second_worker": round(one["build_s"] / two["build_s"], 2),
        "driver_share_of_two_workers": round(two["driver_cpu_s"] / (2 * two["build_s"]), 3),
        "ms_per_text_sample": round(1000 * many["build_s"] / many["samples"], 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
