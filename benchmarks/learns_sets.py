"""Corpora whose answers can be known only from the pictures, in the layouts of six upstream sets.

A mark has one of four colours and one of four shapes; which of two pictures, seconds or tiles holds the needle is as
likely the one as the other: guessing is right in a quarter or a half of the cases. Corpora of different seeds share no
picture, but the facts, which are text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from pipelines.demo.ask import QA
from pipelines.demo.draw import COLOURS as PAINTS
from pipelines.demo.draw import Film, Mark, encode, encode_film
from pipelines.demo.files import put, put_json, put_parquet, put_zip
from pipelines.demo.mantis_set import SCHEMA
from pipelines.demo.records import Record, chat_turns, llava_turns

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "ring", "bars", "dot")
PLACES = ("one", "two")
ANIMALS = ("cat", "dog", "cow", "hen")
SIDE = 336
GREY = (150, 150, 150)
NEEDLE, *OTHERS = COLOURS

FACTS = {
    name: ANIMALS[i % len(ANIMALS)] for i, name in enumerate(("Kim", "Lou", "Max", "Ned", "Ola", "Pia", "Ron", "Sue"))
}
"""Who has which animal: nothing but the text stage says so."""

Count = dict[str, int]
"""Records by kind: facts, captions, looks, details, pictures, clips."""


def write_corpora(data: Path, seed: int, count: Count) -> list[str]:
    """Writes DATA/<source>/ for six sources; returns all text, for the tokenizer."""
    rng = Random(seed)
    texts = _facts(data / "evol_instruct", rng, count["facts"])
    texts += _captions(data / "sharegpt4v", rng, count["captions"])
    texts += _looks(data / "llava15", rng, count["looks"])
    texts += _mantis(data / "mantis", rng, count["details"], count["pictures"])
    return texts + _clips(data / "videochat2", rng, count["clips"])


def mark(rng: Random, colour: str, shape: str) -> Image.Image:
    """One large mark somewhere about the middle of a grey picture."""
    image = Image.new("RGB", (SIDE, SIDE), GREY)
    pen, paint = ImageDraw.Draw(image), PAINTS[colour]
    x, y, r = (rng.uniform(*span) for span in ((133, 203), (133, 203), (90, 125)))
    if shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=paint)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=paint, width=22)
    elif shape == "bars":
        for top in (y - r, y - r / 4, y + r / 2):
            pen.rectangle((x - r, top, x + r, top + r / 3), fill=paint)
    else:
        pen.ellipse((x - r / 3, y - r / 3, x + r / 3, y + r / 3), fill=paint)
    return image


def striped(rng: Random, tile: int) -> Image.Image:
    """A grey picture two tiles wide, one of which has a field of stripes a pixel wide.

    The stripes are as bright as the rest on average: scaled down to one tile's size, the picture is plain grey.
    """
    pixels = np.full((SIDE, 2 * SIDE, 3), GREY, np.uint8)
    y, x = rng.randrange(20, 100), tile * SIDE + rng.randrange(20, 100)
    pixels[y : y + 200, x : x + 200 : 2] = 250
    pixels[y : y + 200, x + 1 : x + 201 : 2] = 50
    return Image.fromarray(pixels)


def _facts(root: Path, rng: Random, count: int) -> list[str]:
    """Evol-Instruct: facts, and descriptions to read, which teach the words that pictures are spoken of with."""
    rounds = [_fact(rng) if i % 2 else _reading(rng) for i in range(count)]
    records = [{"idx": str(i), "conversations": llava_turns([qa])} for i, qa in enumerate(rounds)]
    put_json(root / "allava_text/Evol-Instruct-GPT4-Turbo-143K.json", records)
    return _texts(rounds)


def _fact(rng: Random) -> QA:
    name = rng.choice(tuple(FACTS))
    return f"Which animal has {name}?", FACTS[name]


def _reading(rng: Random) -> QA:
    """A description up to 64 times over, about as long as a picture: the model must bear that before it sees any."""
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    question, answer = rng.choice(
        (("What", f"{colour} {shape}"), ("Which colour", colour), ("Which shape", shape)),
    )
    seen = " ".join([f"{colour} {shape}"] * rng.choice((1, 1, 4, 16, 64)))
    return f"{seen}\n{question} is it?", answer


def _captions(root: Path, rng: Random, count: int) -> list[str]:
    """ShareGPT4V: the mark's colour and shape."""
    records: list[Record] = []
    rounds: list[QA] = []
    for i in range(count):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        path = f"coco/train2017/{i:012d}.jpg"
        put(root / path, encode(mark(rng, colour, shape)))
        rounds.append(("<image>\nWhat is it?", f"{colour} {shape}"))
        records.append({"id": f"{i:012d}", "image": path, "conversations": llava_turns(rounds[-1:])})
    put_json(root / "sharegpt4v_instruct_gpt4-vision_cap100k.json", records)
    return _texts(rounds)


def _looks(root: Path, rng: Random, count: int) -> list[str]:
    """LLaVA-1.5: a mark's colour or shape; a sixth are rows without a picture, which the real mix has too."""
    records: list[Record] = []
    rounds: list[QA] = []
    for i in range(count):
        if i % 6 == 5:
            rounds.append(_fact(rng))
            records.append({"id": f"{i:012d}", "model": "", "conversations": llava_turns(rounds[-1:])})
            continue
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        path = f"coco/train2017/{i:012d}.jpg"
        put(root / path, encode(mark(rng, colour, shape)))
        kind, answer = rng.choice((("colour", colour), ("shape", shape)))
        rounds.append((f"<image>\nWhich {kind} is it?", answer))
        records.append({"id": f"{i:012d}", "image": path, "conversations": llava_turns(rounds[-1:])})
    put_json(root / "llava_v1_5_mix665k.json", records)
    return _texts(rounds)


def _mantis(root: Path, rng: Random, details: int, pictures: int) -> list[str]:
    """Mantis: single pictures with a detail (docvqa), and which of two is red (iconqa)."""
    return _config(root / "docvqa", rng, details, _detail) + _config(root / "iconqa", rng, pictures, _needle)


def _detail(rng: Random) -> tuple[list[Image.Image], QA]:
    tile = rng.randrange(2)
    return [striped(rng, tile)], ("<image>\nWhich part has stripes?", PLACES[tile])


def _needle(rng: Random) -> tuple[list[Image.Image], QA]:
    needle = rng.randrange(2)
    colours = [NEEDLE if i == needle else rng.choice(OTHERS) for i in range(2)]
    shown = [mark(rng, colour, rng.choice(SHAPES)) for colour in colours]
    return shown, ("<image>\n" * 2 + f"Which picture is {NEEDLE}?", PLACES[needle])


def _config(folder: Path, rng: Random, count: int, make: Callable[[Random], tuple[list[Image.Image], QA]]) -> list[str]:
    rows: list[Record] = []
    files: dict[str, bytes] = {}
    rounds: list[QA] = []
    for i in range(count):
        shown, qa = make(rng)
        names = [f"{i:06d}_{n}.png" for n in range(len(shown))]
        files |= {name: encode(image, "PNG") for name, image in zip(names, shown, strict=True)}
        images = [{"bytes": None, "path": name} for name in names]
        rows.append({"id": str(i), "images": images, "conversation": chat_turns([qa]), "source": folder.name})
        rounds.append(qa)
    put_parquet(folder / "train-00000-of-00001.parquet", rows, SCHEMA)
    put_zip(folder / "train_images.zip", files)
    return _texts(rounds)


def _clips(root: Path, rng: Random, count: int) -> list[str]:
    """VideoChat2-IT: clips of two seconds; in one of them a red mark covers the one that is there."""
    records: list[Record] = []
    rounds: list[QA] = []
    for i in range(count):
        second = rng.randrange(2)
        still = Mark("circle", rng.choice(OTHERS), "centre", 0.9)
        needle = Mark("square", NEEDLE, "centre", 1.2)
        film = Film("grey", still, still, 9, needle, second, seconds=2, fps=2, size=(SIDE, SIDE))
        put(root / f"videos/clevrer/video_{i:05d}.mp4", encode_film(film))
        rounds.append((f"Which second is {NEEDLE}?", PLACES[second]))
        question, answer = rounds[-1]
        records.append({"video": f"video_{i:05d}.mp4", "QA": [{"i": "", "q": question, "a": answer}]})
    put_json(root / "video/reasoning/clevrer_qa/train.json", records)
    return _texts(rounds)


def _texts(rounds: Sequence[QA]) -> list[str]:
    return [text for qa in rounds for text in qa]
