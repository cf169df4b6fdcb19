"""The C++ part of :mod:`fake_cuda`, compiled on the fly and loaded before torch. This file imports no torch."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path


SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def missing():
    """Why the library cannot be built here; empty if it can."""
    if shutil.which("g++") is None:
        return "fake CUDA is compiled by g++, which is not installed"
    return (
        "" if (_torch() / "include").is_dir() else "fake CUDA is compiled against torch's headers, which are missing"
    )


def build(folder):
    """Compile the library once for this source and this torch; returns its path."""
    torch = _torch()
    version = (torch / "version.py").read_bytes()
    library = Path(folder, f"fake_cuda_{hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:12]}.so")
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        torch_libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}", str(SOURCE)]
        subprocess.run([*command, "-o", str(unfinished), *torch_libraries], check=True, capture_output=True)
        unfinished.replace(library)  # another process may have built it meanwhile
    return library


def load(library):
    """Register the device; torch looks for it once, when it is imported."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch():
    (folder,) = importlib.util.find_spec("torch").submodule_search_locations
    return Path(folder)
