"""The compiled stub of a CUDA device, built once for a version of torch; torch itself is not imported here."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
BUILT = Path(__file__).parents[2] / "build" / "simulated_cuda"


def compiler() -> str | None:
    """A C++ compiler: what CXX names, or the first that is found."""
    return next(
        (
            found
            for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++")
            if name and (found := shutil.which(name))
        ),
        None,
    )


def library() -> Path:
    """The shared library, which has to be loaded before torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch, version = Path(spec.origin).parent, importlib.metadata.version("torch")
    target = BUILT / (hashlib.sha256(SOURCE.read_bytes() + f"{torch} {version}".encode()).hexdigest()[:16] + ".so")
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        links = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(
            [
                str(compiler()),
                "-shared",
                "-fPIC",
                "-O1",
                "-std=c++20",
                *headers,
                str(SOURCE),
                *links,
                "-o",
                str(partial),
            ],
            check=True,
        )
        os.replace(partial, target)  # whoever else builds it meanwhile gets the same
    return target
