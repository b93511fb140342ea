"""Compile CUDA sources for the CPU, against the headers that emulate the GPU, and load them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
# Every library is a machine of its own, also where one process loads several.
FLAGS += ["-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas"]
INCLUDES = ["-I", str(HERE / "include"), "-I", str(CSRC)]

IN_ORDER, RANDOM, ADVERSARIAL = range(3)  # the schedules of emulator_seed


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastscore" / "emulator"


@cache
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise FileNotFoundError("the emulator needs g++ (or CXX)")
    return found


def headers_digest() -> bytes:
    digest = hashlib.sha256()
    for folder in (HERE / "include", CSRC):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cuh", ".hpp", ".inc"}:
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    version = subprocess.run([compiler(), "--version"], check=True, capture_output=True).stdout
    return digest.digest() + version


def run(arguments: list[str]) -> None:
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr}")


def make(target: Path, arguments: list[str]) -> Path:
    """Run the compiler unless the target is there, or wait where another process makes it."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                    made = Path(folder) / target.name
                    run([compiler(), *arguments, "-o", str(made)])
                    made.replace(target)
    return target


def objects(sources: list[Path], defines: dict[str, object] | None = None) -> list[Path]:
    """Compile the sources; what is in the cache already, and no input of which has changed, is there at once."""
    macros = [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    common = headers_digest() + repr((FLAGS, macros)).encode()

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(common + str(source.resolve()).encode() + source.read_bytes()).hexdigest()[:32]
        target = cache_folder() / f"{source.stem}-{key}.o"
        return make(target, [*FLAGS, *macros, *INCLUDES, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, map(Path, sources)))


def build(sources: list[Path], defines: dict[str, object] | None = None, out: Path | None = None) -> ctypes.CDLL:
    """One shared library of the sources, loaded; from the cache where no input has changed."""
    return link(objects(sources, defines), out)


def link(objects: list[Path], out: Path | None = None) -> ctypes.CDLL:
    """One shared library of objects, loaded; from the cache where it has been linked before."""
    key = hashlib.sha256(repr([path.name for path in objects]).encode()).hexdigest()[:32]
    library = make(cache_folder() / f"emulated-{key}.so", ["-shared", *map(str, objects), "-ldl"])
    if out:
        shutil.copyfile(library, out)
    loaded = ctypes.CDLL(str(out or library))
    loaded.emulator_seed.argtypes = [ctypes.c_uint64, ctypes.c_int]
    loaded.emulator_seed.restype = None
    loaded.emulator_device.argtypes = [ctypes.c_int] * 3
    loaded.emulator_device.restype = None
    loaded.emulator_error.restype = ctypes.c_char_p
    return loaded
