"""Our C code as a library, compiled once for this machine's CPU by the compiler that is there.

Called by the native step. Compiled code lies in the user's cache directory, by source and CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import platformdirs

_SOURCES = Path(__file__).with_name("native")
_CPU = Path("/proc/cpuinfo")
_NEEDED = ("avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16")
# Its OpenMP is torch's, so both share their threads, which must not be more than there are cores.
_COMPILER = "gcc"
# What uses tiles is compiled anywhere, and asks whether it may run.
_FLAGS = ("-O3", "-march=native", "-mamx-tile", "-mamx-bf16", "-fopenmp", "-shared", "-fPIC")
_TIME_S = 60.0
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_FUNCTIONS = {
    "step": "ppn",
    "norm": "ppnnfpi",
    "rotate": "pnnnnppi",
    "activate": "pnnpi",
    "add": "ppnni",
    "tiles": "i",
}


class NoNativeStep(Exception):
    """Why torch has to do without it, in a few words."""


def native_library() -> ctypes.CDLL:
    """The functions of native/step.c. Raises NoNativeStep."""
    flags = _cpu_flags()
    if missing := [name for name in _NEEDED if name not in flags]:
        raise NoNativeStep(f"the CPU has no {missing[0]}")
    try:
        library = ctypes.CDLL(str(_compiled(" ".join(sorted(flags)))))
    except (OSError, subprocess.SubprocessError) as error:
        raise NoNativeStep(f"it cannot be compiled: {error}") from error
    for name, kinds in _FUNCTIONS.items():
        function = getattr(library, f"vlmchat_{name}")
        function.argtypes = [_KINDS[kind] for kind in kinds]
    return library


def _cpu_flags() -> set[str]:
    try:
        lines = _CPU.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _compiled(cpu: str) -> Path:
    """The library's file. Raises NoNativeStep, OSError and SubprocessError."""
    sources = b"".join(file.read_bytes() for file in sorted(_SOURCES.iterdir()))
    key = hashlib.sha256(sources + " ".join((*_FLAGS, cpu)).encode()).hexdigest()
    folder = platformdirs.user_cache_path("vlmchat")
    library = folder / f"native-{key[:16]}.so"
    if not library.exists():
        compiler = shutil.which(_COMPILER)
        if compiler is None:
            raise NoNativeStep(f"there is no {_COMPILER}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            command = [compiler, *_FLAGS, "-o", str(fresh), str(_SOURCES / "step.c")]
            subprocess.run(command, check=True, capture_output=True, timeout=_TIME_S)
            fresh.rename(library)  # whole, or not at all
    if library.stat().st_uid not in (0, os.getuid()):  # as under sudo, with a user's home
        raise NoNativeStep(f"{library} is another user's")
    return library
