"""What a run leaves: a folder in Hugging Face layout that says which data made it."""

import json
import shutil
from pathlib import Path
from typing import Any

from formats.manifest import INDEX, MANIFEST, file_sha256
from model.feed import Feed
from model.prepare import Prepared
from model.stage import Stage, TrainSettings, identity
from model.vision import MEAN, STD
from model.weights import export
from model.world import World

FINAL, BUILDS = "final", "builds.json"


def write_final(settings: TrainSettings, stage: Stage, made: Prepared, feed: Feed, world: World, steps: int) -> Path:
    """Writes OUT/final, whole or not at all. All processes call it together."""
    final = settings.out / FINAL
    partial = final.with_name(f"{FINAL}.partial")
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    export(made.model, partial, made.dtypes, write=world.first)
    if world.first:
        feed.tokenizer.copy_to(partial)
        _write(partial / "preprocessor_config.json", _image_processor(made))
        _write(partial / BUILDS, _provenance(settings, stage, made, feed, steps))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    world.told(None)
    return final


def _provenance(settings: TrainSettings, stage: Stage, made: Prepared, feed: Feed, steps: int) -> dict[str, Any]:
    """Which data made this model, those of the model that it started from included."""
    builds = [
        {
            "path": part.name,
            "recipe": part.manifest["recipe"].get("name"),
            "samples": part.index.num_rows,
            "weight": weight,
            "manifest_sha256": file_sha256(part.folder / MANIFEST),
            "index_sha256": file_sha256(part.folder / INDEX),
        }
        for part, weight in zip(feed.blend.parts, feed.blend.weights, strict=True)
    ]
    earlier = made.init / BUILDS if made.init else None
    return {
        "builds": builds,
        "steps": steps,
        "stage": stage.as_dict(),
        "settings": identity(settings, stage),
        "before": json.loads(earlier.read_text()) if earlier and earlier.is_file() else None,
    }


def _image_processor(made: Prepared) -> dict[str, Any]:
    """How `model.processor` makes pixels, in the words of transformers' CLIPImageProcessor."""
    side = made.model.config.vision_config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
