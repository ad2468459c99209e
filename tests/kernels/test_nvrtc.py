"""Run-time compilation: the sources compile for several architectures without a GPU, and failures say why."""

import importlib.util

import pytest
import torch

from grass_lib.errors import GrassError, UsageError
from grass_lib.kernels import nvrtc
from grass_lib.kernels.dense import even_splits
from grass_lib.kernels.fjlt import pack_bits, pass_widths
from grass_lib.kernels.launch import flat_rows


def _compiler() -> bool:
    if importlib.util.find_spec("cuda") is None:
        return False
    try:
        nvrtc.compile_source("read.cu", {"IN": 0, "OUT": 0}, "sm_80")
    except GrassError:
        raise
    except (RuntimeError, ImportError, OSError):  # the compiler's library is missing
        return False
    return True


needs_compiler = pytest.mark.skipif(not _compiler(), reason="needs cuda-bindings and NVRTC")

_SJLT = {"R": 4, "T": 512, "WARPS": 8, "STAGES": 2}
_FJLT = {"M": 12, "FULL": 12, "S": 12, "V": 2, "THREADS": 256, "SLICE": 16, "W0": 4, "W1": 4, "W2": 4, "W3": 0}
_SOURCES = [
    ("sjlt.cu", _SJLT | {"GATHER": 0}),
    ("sjlt.cu", _SJLT | {"GATHER": 1}),
    ("fjlt.cu", _FJLT),
    ("rademacher.cu", {"NT": 2}),
    ("gather.cu", {}),
    ("columns.cu", {"ONES": 1, "ONE": 1, "THREADS": 256, "ROWS": 16}),
    ("contract.cu", {"K1": 128, "K2": 128, "SJLT": 1, "LAYERS": 64}),
    ("contract.cu", {"K1": 128, "K2": 128, "SJLT": 1, "NEAR": 65536, "ENTRIES": 16384, "LAYERS": 64}),
    ("contract.cu", {"K1": 48, "K2": 16, "SJLT": 0, "LAYERS": 64}),
    ("sampled.cu", {"THREADS": 256, "GROUP": 8, "ITEMS": 4}),
    ("reduce.cu", {}),
    ("read.cu", {}),
]


@needs_compiler
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("file", "constants"), _SOURCES)
def test_sources_compile(file: str, constants: dict[str, int], architecture: str) -> None:
    for code in (0, 2):
        assert nvrtc.compile_source(file, {**constants, "IN": code, "OUT": code}, architecture)[1:4] == b"ELF"


@needs_compiler
def test_a_compiler_error_is_shown() -> None:
    with pytest.raises(GrassError, match="WARPS"):
        nvrtc.compile_source("sjlt.cu", {"IN": 0, "OUT": 0}, "sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given() -> None:
    assert "GPU" in (nvrtc.missing_for_kernels() or "")
    with pytest.raises(UsageError, match="GPU"):
        nvrtc.kernel("read.cu", "read_all", "PlP", {"IN": 0, "OUT": 0}, torch.device("cuda", 0))
    with pytest.raises(UsageError, match="CUDA"):
        flat_rows(torch.zeros(2, 3))


@pytest.mark.parametrize("bits", range(16))
def test_pass_widths_cover_the_transform(bits: int) -> None:
    widths = pass_widths(bits)
    assert sum(widths) == bits
    assert max(widths) <= 5
    assert list(widths) == sorted(widths, reverse=True)


def test_pack_bits() -> None:
    flags = torch.rand(77, generator=torch.Generator().manual_seed(0)) < 0.5
    words = pack_bits(flags).to(torch.int64) & 0xFFFFFFFF
    assert [bool(words[i // 32] >> (i % 32) & 1) for i in range(77)] == flags.tolist()


@pytest.mark.parametrize(("tiles", "chunks", "slots"), [(16, 37_500, 132), (1, 1, 132), (500, 3, 132), (7, 100, 4)])
def test_even_splits_cover_all_chunks(tiles: int, chunks: int, slots: int) -> None:
    splits, each = even_splits(tiles, chunks, slots)
    assert (splits - 1) * each < chunks <= splits * each
