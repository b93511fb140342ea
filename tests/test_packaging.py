"""The wheels and the source distribution: what they hold, and that wheels work in an environment of their own.

FASTSCORE_WHEEL names a wheel with CUDA kernels to test; without it one is compiled, in minutes, where there is nvcc.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from steps import SAFE_PATH

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SMOKE = ROOT / "tests" / "smoke.py"


def run(*command, **options):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | options.pop("env", {})
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(source, folder, **env):
    """Build a wheel from a folder or a source distribution, with the installed build tools if there are any."""
    tools = all(map(find_spec, ("scikit_build_core", "pybind11")))
    flags = ["--no-build-isolation"] if tools else []
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *flags, "--wheel-dir", folder, source]
    folder.mkdir(exist_ok=True)
    run(*command, cwd=folder, env={"FASTSCORE_REQUIRE_CUDA": "", "FASTSCORE_NO_CUDA": ""} | env)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel without CUDA kernels."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"), FASTSCORE_NO_CUDA="1")


@pytest.fixture(scope="module")
def cuda_wheel(tmp_path_factory):
    """The wheel with CUDA kernels."""
    if given := os.environ.get("FASTSCORE_WHEEL"):
        return Path(given)
    need_nvcc()
    return build(ROOT, tmp_path_factory.mktemp("cuda"), FASTSCORE_REQUIRE_CUDA="1")


def need_nvcc():
    if not shutil.which(os.environ.get("CUDACXX", "nvcc")):
        pytest.skip("no nvcc to compile kernels with")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    env = {}
    if not find_spec("scikit_build_core"):
        # pip has no command for a source distribution: the build's own requirements, as pyproject.toml names them.
        wanted = re.search(r"(?m)^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text())[1]
        tools = folder / "tools"
        run(sys.executable, "-m", "pip", "install", "-q", "--target", tools, *re.findall(r'"([^"]+)"', wanted))
        env = {"PYTHONPATH": str(tools)}
    build = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=ROOT, env=env)
    (path,) = folder.glob("*.tar.gz")
    return path


def install(wheel, folder):
    """Make an environment with the wheel; everything else comes from the running interpreter's packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", folder, "install", "-q", "--no-deps", wheel)
    # Folders named in a .pth file follow site-packages, and .pth files inside them, an editable install's for one, are
    # not read: the wheel comes first.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def cuda_environment(cuda_wheel, tmp_path_factory):
    return install(cuda_wheel, tmp_path_factory.mktemp("cuda_environment"))


def sources():
    """Return what a pure wheel holds beside its metadata."""
    found = {f"fastscore/{path.relative_to(ROOT / 'fastscore')}" for path in (ROOT / "fastscore").rglob("*.py")}
    found.add("fastscore/py.typed")
    found |= {f"fastscore/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {"fastscore/density.py", "fastscore/kernels/__init__.py"} <= found
    return found


def metadata(names):
    (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    return folder


def test_wheel_is_pure_and_holds_the_package_and_nothing_else(wheel):
    assert re.fullmatch(r"fastscore-[0-9.]+\w*-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = metadata(names)
        about = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
        licences = [archive.read(name) for name in names if name.endswith("LICENSE")]
    assert {name for name in names if not name.startswith(f"{info}/")} == sources()
    assert "License-Expression: Apache-2.0" in about
    assert licences == [(ROOT / "LICENSE").read_bytes()]
    assert re.search(r"\[console_scripts\]\s+fastscore ?= ?fastscore\.cli\.commands:main", commands)
    assert re.search(r"(?m)^Requires-Dist: torch>=2\.8", about)


def test_installed_wheel_estimates_a_known_integral(environment):
    out = run(environment / "bin" / "python", *SAFE_PATH, SMOKE, cwd=environment)
    assert Path(out.strip()).is_relative_to(environment)


def test_installed_command_tells_its_version_and_what_is_there(environment, wheel):
    version = wheel.name.split("-")[1]
    command = environment / "bin" / "fastscore"
    assert version in run(command, "--version", cwd=environment)
    info = run(command, "info", cwd=environment)
    assert re.search(rf"(?m)^  fastscore +{re.escape(version)}$", info)
    assert re.search(r"(?m)^  torch on cpu +can run$", info)
    assert "cannot be found out" not in info


def test_wheel_with_kernels_holds_the_same_and_the_native_module(cuda_wheel):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"fastscore-[0-9.]+\w*-{python}-{python}-(many)?linux_\w*x86_64\.whl", cuda_wheel.name)
    with zipfile.ZipFile(cuda_wheel) as archive:
        names = archive.namelist()
    held = {name for name in names if not name.startswith(f"{metadata(names)}/") and not name.endswith("/")}
    (native,) = held - sources()
    assert held - {native} == sources()
    assert re.fullmatch(r"fastscore/_C\.[\w-]+\.so", native)
    assert cuda_wheel.stat().st_size < 20 << 20


# What every Linux has: the C++ and the C library; until glibc 2.34 the latter came in parts.
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
SYSTEM |= {"libpthread.so.0", "libdl.so.2", "librt.so.1"}


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf, of binutils, is not there")
def test_native_module_links_the_systems_libraries_alone(cuda_environment):
    (native,) = cuda_environment.glob("lib/python*/site-packages/fastscore/_C.*.so")
    dynamic = run("readelf", "-d", native)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert {"libc.so.6"} <= needed <= SYSTEM
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_installed_wheel_with_kernels_works_with_and_without_a_driver(cuda_environment):
    out = run(cuda_environment / "bin" / "python", *SAFE_PATH, SMOKE, cwd=cuda_environment)
    assert Path(out.strip()).is_relative_to(cuda_environment)
    info = run(cuda_environment / "bin" / "fastscore", "info", cwd=cuda_environment)
    assert re.search(r"(?m)^  fastscore\._C +present\n  architectures +80-real 90a-real 90-virtual$", info)
    assert re.search(r"(?m)^  driver +(none|CUDA [0-9.]+)$", info)
    assert "cannot be found out" not in info


@pytest.fixture
def broken(tmp_path):
    """A copy of the sources whose only kernel does not compile."""
    folder = tmp_path / "broken"
    for name in ("fastscore", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc").mkdir()
    for name in ("CMakeLists.txt", "strict_nvcc.sh"):
        shutil.copy(ROOT / "csrc" / name, folder / "csrc")
    (folder / "csrc" / "kernel.cu").write_text("int broken = ;\n")
    return folder


def test_a_required_kernel_that_does_not_compile_fails_with_the_compilers_words(broken, tmp_path):
    need_nvcc()
    with pytest.raises(AssertionError, match=r"kernel\.cu\(1\): error: expected an expression"):
        build(broken, tmp_path / "wheel", FASTSCORE_REQUIRE_CUDA="1")


def test_without_nvcc_the_wheel_is_pure_unless_kernels_are_required(broken, tmp_path):
    nowhere = str(tmp_path / "nvcc")
    assert build(broken, tmp_path / "wheel", CUDACXX=nowhere).name.endswith("-py3-none-any.whl")
    with pytest.raises(AssertionError, match=r"fastscore\._C needs nvcc of CUDA 13,\s+found\s+no"):
        build(broken, tmp_path / "required", CUDACXX=nowhere, FASTSCORE_REQUIRE_CUDA="1")
    # Both at once: what is required wins.
    with pytest.raises(AssertionError, match=r"fastscore\._C needs nvcc of CUDA 13,\s+found\s+no"):
        build(broken, tmp_path / "both", CUDACXX=nowhere, FASTSCORE_REQUIRE_CUDA="1", FASTSCORE_NO_CUDA="1")


def test_source_distribution_holds_the_sources_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "kernels/__init__.py", "fastscore/density.py"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert wanted <= names
    assert not {name for name in names if name.startswith((".venv", ".git/", "tests", ".ci")) or "__pycache__" in name}
    built = build(sdist, tmp_path / "wheel", FASTSCORE_NO_CUDA="1")
    with zipfile.ZipFile(built) as rebuilt, zipfile.ZipFile(wheel) as direct:
        assert set(rebuilt.namelist()) == set(direct.namelist())
