import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from formats import imaging, resample
from formats.imaging import MEAN_COLOUR, SIDE, fit_with_pillow
from formats.resample import blank, resize_square
from formats.resample_llvm import assembly


def harsh(height: int, width: int, seed: int = 0):
    """Noise with many black and white pixels, whose filtered values leave 0 … 255."""
    random = np.random.default_rng(seed)
    pixels = blank(height, width)
    pixels[:] = random.integers(0, 256, pixels.shape)
    extreme = random.random((height, width))
    pixels[extreme < 0.3] = 0
    pixels[extreme > 0.7] = 255
    return pixels


def test_the_loops_compile_here():
    assert resample._loops() is not None


@given(st.integers(7, 900), st.integers(7, 900), st.integers(0, 2**32 - 1))
@example(336, 336, 0)
@example(337, 336, 0)
@example(1, 1000, 0)
@example(20_000, 300, 0)
@settings(max_examples=60, deadline=None)
def test_a_picture_is_the_one_that_pillow_makes_or_is_left_to_pillow(height, width, seed):
    pixels = harsh(height, width, seed)
    result = resize_square(pixels, pixels.shape[1::-1], SIDE, MEAN_COLOUR)
    assert result is None or np.array_equal(result[..., :3], fit_with_pillow(Image.fromarray(pixels)))


@pytest.mark.parametrize("size", [(1500, 2000), (1501, 1001), (480, 640), (30, 40), (2003, 2003)])
def test_ordinary_shapes_are_not_left_to_pillow(size):
    pixels = harsh(*size)
    result = resize_square(pixels, pixels.shape[1::-1], SIDE, MEAN_COLOUR)
    assert np.array_equal(result[..., :3], fit_with_pillow(Image.fromarray(pixels)))


def test_what_lies_behind_a_picture_does_not_matter():
    memory = np.zeros(301 * 201 * 3 + 16, np.uint8)
    pixels = memory[:-16].reshape(301, 201, 3)
    pixels[:] = harsh(301, 201)
    first = resize_square(pixels, pixels.shape[1::-1], SIDE, MEAN_COLOUR)
    memory[-16:] = 255
    assert np.array_equal(resize_square(pixels, pixels.shape[1::-1], SIDE, MEAN_COLOUR)[..., :3], first[..., :3])


@pytest.mark.parametrize("target", [SIDE, 100])
@pytest.mark.parametrize("length", [50, 336, 1000, 5761])
def test_weights_add_up_to_one(length, target):
    _, weights = resample._weights(length, target)
    assert np.abs(weights.sum(1) - (1 << 22)).max() <= weights.shape[1]


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v2", "x86-64-v3", "znver3", "emeraldrapids"])
def test_the_assembly_becomes_code_for_every_kind_of_processor(cpu, lanes):
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    if not target.name.startswith("x86"):
        cpu = ""
    module = llvm.parse_assembly(assembly(bits=22, low=11, lanes=lanes))
    module.verify()
    assert "across" in target.create_target_machine(cpu=cpu, opt=3).emit_assembly(module)


SUM = """
import sys, hashlib
import numpy as np, llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
if sys.argv[1] == "plain" and llvm.get_process_triple().startswith("x86"):
    llvm.get_host_cpu_name, features = lambda: "x86-64", llvm.FeatureMap()
llvm.get_host_cpu_features = lambda: features
from formats import resample
if sys.argv[1] in ("8", "16"):
    resample._lanes = lambda features: int(sys.argv[1])
random, sums = np.random.default_rng(0), hashlib.sha256()
for height, width in ((777, 1023), (61, 2999), (1500, 337), (340, 5000)):
    pixels = resample.blank(height, width)
    pixels[:] = random.integers(0, 256, pixels.shape)
    pixels[random.random((height, width)) < 0.3] = 255
    square = resample.resize_square(pixels, (width, height), 336, (122, 116, 104))
    sums.update(square[..., :3].tobytes())
print(sums.hexdigest())
"""


def test_processors_with_other_vectors_make_the_same_pictures():
    machines = ("plain", "8", "16", "this")
    runs = [subprocess.run([sys.executable, "-c", SUM, name], capture_output=True, text=True) for name in machines]
    assert [run.stderr for run in runs] == [""] * len(runs)
    assert len(runs[0].stdout) == 65
    assert {run.stdout for run in runs} == {runs[0].stdout}


def test_without_llvmlite_the_bytes_are_the_same(monkeypatch):
    image = Image.fromarray(harsh(500, 700))
    with_it = imaging.fit(image)
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    resample._loops.cache_clear()
    try:
        assert resample._loops() is None
        assert imaging.fit(image) == with_it
    finally:
        resample._loops.cache_clear()


HARDENED = """
import ctypes, io, sys
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0  # PR_SET_MDWE: no memory may become executable any more
from formats import imaging, resample
assert not resample.available()
sys.stdout.buffer.write(imaging.picture(sys.stdin.buffer.read(), imaging.ImageSettings())[0].jpeg)
"""


def test_where_no_code_may_be_compiled_pictures_are_the_same():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (450, 700, 3), np.uint8))
    data = imaging.encode(image, imaging.ImageSettings())
    run = subprocess.run([sys.executable, "-c", HARDENED], input=data, capture_output=True)
    if b"prctl" in run.stderr:
        pytest.skip("this kernel cannot forbid executable memory (Linux 6.3)")
    assert run.returncode == 0, run.stderr
    assert run.stdout == imaging.picture(data, imaging.ImageSettings())[0].jpeg
