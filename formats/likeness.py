"""How alike two texts or two pictures are: small fingerprints that can be stored, compared and looked up.

Texts: words in one spelling, hashed; runs of words ("grams") for overlap, and MinHash for the share of common runs.
Pictures: 256 bits, the signs of low frequencies. All of it is numpy over one text or picture; no figure depends on the
process, the machine or the order of calls. Written here because the usual libraries bring SciPy or Numba for a page of
arithmetic; datasketch takes six times as long over a text (benchmarks/duplicates.py).
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

VERSION = 1
"""Of everything here; kept fingerprints of another version are made anew."""

# Texts --------------------------------------------------------------------------------------------------------------

HASHES = 120
"""Values of a MinHash, one byte each."""

BAND = 6
"""Bytes of a band. Two texts that share 80 % of their shingles agree in one of the 20 bands with 99.8 % chance, two
that share half of them with 27 %."""

SHINGLE = 3
"""Words of a shingle, the unit in which MinHash counts."""

GRAM_LIMIT = 64
"""Words of the longest run."""

_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile("([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])")
_CHUNK = 4096  # shingles at a time, so that a document of half a million characters takes 4 MB


def words(text: str) -> list[str]:
    """The words of a text in one spelling: no case, no punctuation; in scripts without spaces, each character."""
    if not text.isascii():
        text = _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.casefold())


def text_key(parts: Iterable[str]) -> bytes:
    """16 bytes that stand for some texts in their order, each up to white space."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(" ".join(part.split()).encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def grams(found: Sequence[str], size: int) -> np.ndarray:
    """A 64-bit hash of each run of `size` words, in order; one of all words if there are fewer, none if none.

    Raises:
        ValueError: if `size` is over `GRAM_LIMIT`.
    """
    if size > GRAM_LIMIT:
        raise ValueError(f"runs have at most {GRAM_LIMIT} words, not {size}")
    if not found:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in found), np.uint64, len(found))
    size = min(size, len(found))
    runs = len(found) - size + 1
    total = np.full(runs, size, np.uint64)
    for i, factor in enumerate(_FACTORS[:size].tolist()):
        total += hashes[i : i + runs] * np.uint64(factor)
    return _mixed(total)


def minhash(found: Sequence[str], otherwise: bytes = b"") -> bytes:
    """`HASHES` bytes; the share of equal ones estimates the share of common shingles, with a standard error of 0.04.

    Args:
        found: the words.
        otherwise: what to take if there are no words, so that not all such texts are alike.
    """
    shingles = grams(found, SHINGLE)
    if not len(shingles):
        shingles = np.frombuffer(hashlib.blake2b(otherwise, digest_size=8).digest(), np.uint64)
    least = np.full(HASHES, np.iinfo(np.uint64).max)
    for start in range(0, len(shingles), _CHUNK):
        spread = shingles[None, start : start + _CHUNK] * _MULTIPLY[:, None] + _ADD[:, None]
        least = np.minimum(least, spread.min(axis=1))
    return (_mixed(least) >> np.uint64(56)).astype(np.uint8).tobytes()


def resemblance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated shares of common shingles.

    Args:
        one, other: MinHashes, (n, HASHES) uint8.

    Returns:
        (n,) float64 between 0 and 1.
    """
    share: np.ndarray = (one == other).mean(axis=1)
    return share


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads every bit of 64 over all (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    spread: np.ndarray = values ^ (values >> np.uint64(31))
    return spread


def _odd_numbers(count: int, seed: int) -> np.ndarray:
    """Fixed numbers that look random; not from numpy's generators, whose streams may change with its version."""
    return _mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(seed)) | np.uint64(1)


_FACTORS = _odd_numbers(GRAM_LIMIT, 0x9E3779B97F4A7C15)
_MULTIPLY = _odd_numbers(HASHES, 0xD1B54A32D192ED03)
_ADD = _odd_numbers(HASHES, 0x8CB92BA72F3D8DD7)

# Pictures -----------------------------------------------------------------------------------------------------------

LOOK = 32
"""Bytes of a picture's hash."""

ALIKE = 24
"""Bits of 256 in which the hashes of one picture may differ after it was re-encoded or resized."""

_SIDE, _WAVES = 64, 16
_LEAST_DETAIL = 0.5  # mean step between neighbours, in levels of grey; below it a hash would be of noise


def _waves() -> np.ndarray:
    """The 16 lowest cosines over 64 points, the constant one left out; whole numbers, to be exact on any machine."""
    frequency, place = np.arange(1, _WAVES + 1)[:, None], np.arange(_SIDE)[None, :] + 0.5
    waves: np.ndarray = np.rint(4096 * np.cos(np.pi / _SIDE * frequency * place)).astype(np.int64)
    return waves


_COSINES = _waves()


def look(image: Image.Image) -> bytes | None:
    """256 bits that stay nearly the same when a picture is resized or encoded anew; None if it shows nothing.

    The signs of its 16x16 lowest frequencies against their median, on 64x64 grey pixels, much as Meta's PDQ has them.
    """
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=4.0)
    grey = np.asarray(small, np.int64)
    if (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2 < _LEAST_DETAIL:
        return None
    waves = _COSINES @ grey @ _COSINES.T
    return np.packbits(waves > np.median(waves)).tobytes()


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """In how many bits hashes of pictures differ.

    Args:
        one, other: (..., LOOK) uint8, of shapes that broadcast.

    Returns:
        (...) int64.
    """
    wide = [np.ascontiguousarray(part).view(np.uint64) for part in (one, other)]
    bits: np.ndarray = np.bitwise_count(wide[0] ^ wide[1]).sum(axis=-1, dtype=np.int64)
    return bits
