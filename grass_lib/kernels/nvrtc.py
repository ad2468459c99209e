"""Compiles the CUDA C++ beside this module at run time and launches it on PyTorch's current stream.

NVRTC and the driver are reached through ``cuda-bindings``, a dependency of recent CUDA builds of PyTorch: users build
nothing. A kernel is compiled once per process, device and set of constants, in about half a second.
"""

import ctypes
import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from grass_lib.errors import GrassError, UsageError

_FOLDER = Path(__file__).parent
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
_LETTERS: Mapping[str, Any] = {"P": _POINTER, "i": _INT, "I": ctypes.c_uint, "l": _LONG, "f": _FLOAT, "S": None}


def missing_for_kernels() -> str | None:
    """Says why the run-time compiled kernels cannot work here, or None where they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch; the kernels are CUDA C++"
    try:
        importlib.import_module("cuda.bindings.driver")
        importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        return f"the package cuda-bindings is missing ({error}); install it with `pip install cuda-bindings`"
    return None


class Kernel:
    """One compiled kernel on one device.

    Attributes:
        name: The kernel's name in its source.
    """

    def __init__(self, name: str, function: Any, signature: str, device: torch.device) -> None:
        self.name = name
        self._function = function
        self._types = tuple(_LETTERS[letter] for letter in signature)
        self._device = device
        self._driver = importlib.import_module("cuda.bindings.driver")
        self._shared = 0

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[int | float | bytes | None],
    ) -> None:
        """Launches on the current stream of the kernel's device; does not wait.

        Args:
            grid: Thread blocks along x, y and z.
            threads: Threads in a block.
            shared_bytes: Dynamic shared memory of a block, bytes.
            arguments: One value per letter of the signature; tensors are passed as their ``data_ptr()``, a structure
                as its bytes.

        Raises:
            GrassError: The driver refused the launch.
        """
        driver = self._driver
        if shared_bytes > max(self._shared, 48 * 1024):
            _check(
                driver.cuFuncSetAttribute(
                    self._function,
                    driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes,
                ),
                f"asking for {shared_bytes} bytes of shared memory in {self.name}",
            )
            self._shared = shared_bytes
        stream = torch.cuda.current_stream(self._device).cuda_stream
        x, y, z = (*grid, 1, 1)[:3]
        values: Any = (tuple(arguments), self._types)
        if None in self._types:
            # The bindings know no structures by value: an array of addresses says where each argument lies.
            held = [
                ctypes.create_string_buffer(value, len(value)) if isinstance(value, bytes) else kind(value)  # pyright: ignore[reportOptionalCall]
                for value, kind in zip(arguments, self._types, strict=True)
            ]
            places = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
            values = ctypes.addressof(places)
        with torch.cuda.device(self._device):
            result = driver.cuLaunchKernel(self._function, x, y, z, threads, 1, 1, shared_bytes, stream, values, 0)
        if int(result[0]) != 0:
            _check(result, f"launching {self.name} with grid {(x, y, z)}, {threads} threads, {shared_bytes} bytes")


@lru_cache(maxsize=512)
def _compiled(file: str, name: str, signature: str, constants: tuple[tuple[str, int], ...], index: int) -> Kernel:
    reason = missing_for_kernels()
    if reason:
        raise UsageError(f'backend="kernel" cannot run: {reason}. Use backend="torch" here.')
    driver = importlib.import_module("cuda.bindings.driver")
    device = torch.device("cuda", index)
    torch.cuda.init()
    major, minor = torch.cuda.get_device_capability(device)
    binary = compile_source(file, dict(constants), f"sm_{major}{minor}")
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # makes torch's own context current before a module is loaded
        module = _check(driver.cuModuleLoadData(binary), f"loading {file}")
        function = _check(driver.cuModuleGetFunction(module, name.encode()), f"finding {name} in {file}")
    return Kernel(name, function, signature, device)


def kernel(file: str, name: str, signature: str, constants: Mapping[str, int], device: torch.device) -> Kernel:
    """Compiles ``file`` with the given constants, or returns the kernel compiled before.

    Args:
        file: A ``.cu`` file of this folder.
        name: The ``extern "C"`` kernel in it.
        signature: One letter an argument: P pointer, i and I 32-bit (I unsigned), l 64-bit integer, f float,
            S structure by value.
        constants: Preprocessor definitions.
        device: The CUDA device to compile for.

    Raises:
        UsageError: There is no GPU, or ``cuda-bindings`` is missing.
        GrassError: The compiler or the driver failed; the message holds the compiler's log.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _compiled(file, name, signature, tuple(sorted(constants.items())), index)


def compile_source(file: str, constants: Mapping[str, int], architecture: str) -> bytes:
    """Compiles a ``.cu`` file of this folder to machine code for ``architecture`` (``sm_90``); needs no GPU.

    Raises:
        GrassError: The compiler failed; the message holds its log.
    """
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    defines = "".join(f"#define {key} {value}\n" for key, value in sorted(constants.items()))
    source = defines + "".join((_FOLDER / part).read_text(encoding="utf-8") for part in ("common.cuh", file))
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), file.encode(), 0, [], []), f"reading {file}")
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "reading the compiler's log")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise GrassError(f"NVRTC could not compile {file} for {architecture} with {dict(constants)}:\n{log.decode()}")
    binary = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "reading the machine code")
    _check(nvrtc.nvrtcGetCUBIN(program, binary), "reading the machine code")
    nvrtc.nvrtcDestroyProgram(program)
    return binary


def _check(result: tuple[Any, ...], doing: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise GrassError(f"CUDA failed while {doing}: {status.name}")
    return values[0] if values else None


def shared_memory(device: torch.device) -> int:
    """Shared memory that one thread block can have on ``device``, bytes."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def processors(device: torch.device) -> int:
    """Number of multiprocessors of ``device``."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
