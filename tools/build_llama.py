"""Builds the pinned llama.cpp once into a cache: libraries, command-line tools and the byte oracle.

    python tools/build_llama.py            # everything the tests need, and llama-cpp-python itself
    python tools/build_llama.py --print    # where it lies

The sources are the archive of llama-cpp-python on PyPI. Three things come out of it, each kept under
``~/.cache/quantkit/llama-<version>-<flags>``:

- ``runtime/``: libllama and libggml as users build them, and llama-quantize, llama-imatrix and
  llama-perplexity, the peers of the benchmarks;
- ``oracle/``: libggml-base built with ``-ffp-contract=off``, the reference for byte equality;
- the Python package llama-cpp-python, installed into this environment on top of ``runtime/``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.3.36"
COMMON = [
    "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN",
]  # fmt: skip
RUNTIME = ["-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TOOLS=ON"]
ORACLE = [
    "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TOOLS=OFF",
    "-DCMAKE_C_FLAGS=-ffp-contract=off", "-DCMAKE_CXX_FLAGS=-ffp-contract=off",
]  # fmt: skip
TOOLS = ["llama-quantize", "llama-imatrix", "llama-perplexity"]


def cache_dir() -> Path:
    """The folder of this version and these flags."""
    key = hashlib.sha256(repr((VERSION, COMMON, RUNTIME, ORACLE)).encode()).hexdigest()[:8]
    root = os.environ.get("QUANTKIT_CACHE") or Path.home() / ".cache" / "quantkit"
    return Path(root) / f"llama-{VERSION}-{key}"


def run(*command: str, **kwargs) -> None:
    """Run a build command quietly; print its output only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if done.returncode:
        sys.stderr.write(done.stdout[-8000:] + done.stderr[-8000:])
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def sources(cache: Path) -> Path:
    """The unpacked llama.cpp sources, fetched from the package index once."""
    target = cache / f"llama_cpp_python-{VERSION}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip"]
        run(*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(cache), f"llama-cpp-python=={VERSION}")
        part = cache / "unpacking"
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(cache / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(part, filter="data")
        (part / target.name).rename(target)
        part.rmdir()
    return target / "vendor" / "llama.cpp"


def build(cache: Path, name: str, flags: list[str], targets: list[str]) -> Path:
    """Configure and build once; returns the folder of the binaries."""
    final = cache / name
    if not final.is_dir():
        work = cache / f"{name}-build"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path}
        run("cmake", "-S", str(sources(cache)), "-B", str(work), *COMMON, *flags, env=env)
        run("cmake", "--build", str(work), "--target", *targets, "-j", str(os.cpu_count()), env=env)
        part = cache / f"{name}-part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(work / "bin", part, symlinks=True)
        part.rename(final)
        shutil.rmtree(work)
    return final


def installed_version() -> str | None:
    """Version of llama-cpp-python in this environment, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def install_python(cache: Path, runtime: Path) -> None:
    """Install the Python side (15 s) and lay the libraries beside it."""
    if installed_version() != VERSION:
        env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
        archive = cache / f"llama_cpp_python-{VERSION}.tar.gz"
        sources(cache)
        run(sys.executable, "-m", "pip", "install", "--no-cache-dir", str(archive), env=env)
    from importlib.metadata import files

    anchor = next(f for f in files("llama-cpp-python") or [] if f.name == "llama_cpp.py")
    lib = Path(str(anchor.locate())).parent / "lib"
    lib.mkdir(exist_ok=True)
    for library in runtime.glob("lib*.so*"):
        target = lib / library.name
        if not target.exists():
            shutil.copy2(library, target, follow_symlinks=True)


def main() -> None:
    """Build what is missing and print where it lies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="only print the folder")
    parser.add_argument("--no-python", action="store_true", help="do not install llama-cpp-python")
    args = parser.parse_args()
    cache = cache_dir()
    if not args.print:
        oracle = build(cache, "oracle", ORACLE, ["ggml-base"])
        runtime = build(cache, "runtime", RUNTIME, ["llama", *TOOLS])
        if not args.no_python:
            install_python(cache, runtime)
        print(f"llama.cpp of llama-cpp-python {VERSION}: {runtime} (oracle: {oracle})")
    else:
        print(cache)


if __name__ == "__main__":
    main()
