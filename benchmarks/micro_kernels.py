"""The micro-kernels of benchmarks/micro: a ring that only fills, products whose operands are there, other warpgroups.

    python benchmarks/micro_kernels.py      compile them for Hopper, into build/micro; needs nvcc, and no GPU

They use the headers of csrc, and belong to no wheel. A library that is there is taken where no source has changed, so a
machine without nvcc can be given one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC, BUILT = HERE.parent / "csrc", HERE.parent / "build" / "micro"
SOURCES = [*sorted((HERE / "micro").glob("*.cu")), CSRC / "steps.cpp"]
# As csrc/CMakeLists.txt has them: every warning is an error, and so are serialized matrix products (strict_nvcc.sh).
FLAGS = ["-std=c++17", "-O3", "-arch=sm_90a", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC"]
_PRODUCTS = [ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64]
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
FUNCTIONS = {
    "micro_fill": [_POINTER, _POINTER, _POINTER, ctypes.c_uint64],
    "micro_products_256": _PRODUCTS,
    "micro_products_512": _PRODUCTS,
    "micro_steps_64": [_INT, _INT, _INT, *(_POINTER,) * 3, ctypes.c_char_p, _INT, ctypes.c_uint64],
}


def compiler() -> str:
    """Return nvcc: of CUDACXX, on PATH or in CUDA's usual place; raise FileNotFoundError if there is none."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise FileNotFoundError("the micro-kernels need nvcc: on PATH, in /usr/local/cuda/bin, or named by CUDACXX")
    return found


def target() -> Path:
    """Return where the library of these sources lies, or would."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    headers = (path for folder in (HERE / "micro", CSRC) for path in folder.rglob("*") if path.suffix in (".h", ".cuh"))
    for path in (*SOURCES, *sorted(headers)):
        digest.update(path.name.encode() + path.read_bytes())
    return BUILT / f"micro-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library unless it is there; return its path."""
    library = target()
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    nvcc = ["sh", str(CSRC / "strict_nvcc.sh"), compiler()]
    objects = [library.with_name(f"{library.stem}-{source.stem}.o") for source in SOURCES]

    def compile_one(source: Path, made: Path) -> None:
        _run([*nvcc, *FLAGS, f"-I{CSRC}", "-c", str(source), "-o", str(made)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    part = library.with_suffix(".part")
    _run([*nvcc, "-arch=sm_90a", "-shared", *map(str, objects), "-o", str(part)])
    part.replace(library)
    for made in objects:
        made.unlink()
    return library


def load(library: Path | ctypes.CDLL) -> ctypes.CDLL:
    """Load a library, of the GPU or the emulator, with the types of its functions."""
    loaded = ctypes.CDLL(str(library)) if isinstance(library, Path) else library
    for name, arguments in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_char_p, arguments
    return loaded


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build())
