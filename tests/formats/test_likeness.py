"""formats.likeness: what counts as alike, on real photographs and on texts."""

import hashlib
import io
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from formats.likeness import ALIKE, GRAM_LIMIT, HASHES, distance, grams, look, minhash, resemblance, text_key, words


def bits_between(one: Image.Image, other: Image.Image) -> int:
    hashes = [look(image) for image in (one, other)]
    assert all(hashes)
    return int(distance(*(np.frombuffer(value or b"", np.uint8) for value in hashes)))


def encoded(image: Image.Image, kind: str, **options: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[Image.Image]:
    folder = shared / "data/annotations/mantis_chat/train_images/sharegpt4v/coco/train2017"
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG at quality 30": lambda image: encoded(image, "JPEG", quality=30),
    "WebP at quality 40": lambda image: encoded(image, "WEBP", quality=40),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "336 pixels wide": lambda image: encoded(image.resize((336, 336 * image.height // image.width)), "JPEG"),
    "twice the size": lambda image: image.resize((image.width * 2, image.height * 2)),
    "64 colours": lambda image: image.quantize(64).convert("RGB"),
    "brighter": lambda image: image.point([min(255, round(v * 1.15)) for v in range(256)] * 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_photograph_stays_alike_when_it_is_encoded_or_scaled_anew(
    photographs: list[Image.Image], change: str
) -> None:
    far = [bits for image in photographs if (bits := bits_between(image, CHANGES[change](image))) > ALIKE]
    assert far == []


def test_different_photographs_are_far_apart(photographs: list[Image.Image]) -> None:
    assert min(bits_between(*pair) for pair in combinations(photographs, 2)) > 3 * ALIKE


def test_a_picture_that_shows_nothing_has_no_hash() -> None:
    noise = np.random.default_rng(0).integers(127, 130, (200, 300, 3), dtype=np.uint8)
    assert look(Image.new("RGB", (300, 200), "white")) is None
    assert look(Image.fromarray(noise)) is None


def test_words_have_one_spelling() -> None:
    assert words("What's  THIS,\n“Straße”?") == ["what", "s", "this", "strasse"]
    assert words("ﬁne ２３") == ["fine", "23"]
    assert words("这是什么 ok") == ["这", "是", "什", "么", "ok"]
    assert words("?!") == []


def test_the_key_of_texts_ignores_white_space_only() -> None:
    assert text_key(["human", "What  is\nit?"]) == text_key(["human", " What is it? "])
    assert text_key(["human", "What is it?"]) != text_key(["human", "what is it?"])
    assert text_key(["a", "b"]) != text_key(["ab"])


def test_grams_are_runs_of_words() -> None:
    text = ["a", "b", "c", "d", "e"]
    assert len(grams(text, 3)) == 3
    assert grams(text, 3)[1] == grams(["b", "c", "d"], 3)[0]
    assert grams(["c", "b", "d"], 3)[0] != grams(["b", "c", "d"], 3)[0]
    assert len(grams(["a"], 3)) == 1
    assert len(grams([], 3)) == 0
    with pytest.raises(ValueError, match="at most"):
        grams(text * 100, GRAM_LIMIT + 1)


@given(st.integers(0, 60), st.integers(0, 2**31))
def test_minhash_estimates_the_share_of_common_shingles(changed: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one = [f"w{i}" for i in random.integers(0, 100_000, 200)]
    other = one[: 200 - changed] + [f"v{i}" for i in range(changed)]
    sets = [{tuple(text[i : i + 3]) for i in range(len(text) - 2)} for text in (one, other)]
    share = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    hashes = [np.frombuffer(minhash(text), np.uint8)[None] for text in (one, other)]
    assert abs(resemblance(*hashes)[0] - share) < 0.25  # over five standard errors


def test_a_long_text_is_hashed_in_pieces_without_a_trace() -> None:
    text = [f"w{i % 5000}" for i in range(20_000)]
    assert minhash(text) == minhash([f"w{i}" for i in range(5000)] + ["w0", "w1"])


def test_texts_without_words_are_alike_only_if_they_are_the_same() -> None:
    assert minhash([], b"!") == minhash([], b"!")
    assert minhash([], b"!") != minhash([], b"?")


def test_fingerprints_are_the_same_on_every_machine() -> None:
    gradient = np.add.outer(np.arange(100), np.arange(100) ** 1.5).astype(np.uint8)
    made = look(Image.fromarray(gradient)) or b""
    assert len(minhash(["a"])) == HASHES
    assert hashlib.sha256(minhash(["the", "cat", "sat", "on", "the", "mat"])).hexdigest()[:16] == "69f174c7ddd87800"
    assert hashlib.sha256(made).hexdigest()[:16] == "fe750d8027fa6dd8"
