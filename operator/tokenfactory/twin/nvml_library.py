"""The simulated NVML library: built from C on first use, and the layout of a node's state file, which C and Python share.

The source is `tests/agent/nvml/`, in a wheel `tokenfactory/twin/_nvml/` (docs/adr/20261121-nvml-library.md).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE_VARIABLE = "TOKENFACTORY_NVML_STATE"
LIBRARY_NAME = "libnvidia-ml.so.1"
COMPILER_FLAGS = (
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-O2",
    "-std=gnu11",
    f"-Wl,-soname,{LIBRARY_NAME}",
)


# ---- the library ----


def source_folder() -> Path:
    """Beside this module in a wheel, under tests/ in a checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "_nvml", here.parents[3] / "tests" / "agent" / "nvml"):
        if (folder / "sim.h").exists():
            return folder
    raise FileNotFoundError(
        "the simulated NVML library's source (sim.h) is neither beside this module nor in tests/agent/nvml: "
        "install Token Factory from its wheel, or run it from a checkout"
    )


def build_library(cache: Path | None = None) -> Path:
    """Compile once per version of the source; the folder of the result is what LD_LIBRARY_PATH needs."""
    files = sorted(path for path in source_folder().iterdir() if path.suffix in {".c", ".h"})
    text = b"".join(path.name.encode() + path.read_bytes() for path in files)
    digest = hashlib.sha256(text + repr(COMPILER_FLAGS).encode()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = (cache or home / "tokenfactory") / f"nvml-{digest}" / LIBRARY_NAME
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / LIBRARY_NAME
        command = [os.environ.get("CC", "cc"), *COMPILER_FLAGS, "-o", str(built)]
        command += [str(path) for path in files if path.suffix == ".c"] + ["-lm", "-lpthread"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(
                f"simulated GPUs need a C compiler, and there is no {command[0]!r}: install one or set CC"
            ) from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"the simulated NVML library does not compile with {command[0]}:\n{error.stderr}"
            ) from None
        built.replace(target)  # whole or not at all, whoever else builds it now
    return target


# ---- the layout of the state, read from its header ----

SCALARS: Mapping[str, Any] = {
    "char": ctypes.c_char,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}


@functools.cache
def layout() -> tuple[Mapping[str, Any], Mapping[str, int]]:
    """The header's structs as ctypes, and its numbers: one description for both languages."""
    header = (source_folder() / "sim.h").read_text()
    numbers = {
        name: int(value, 0) for name, value in re.findall(r"#define (SIM_\w+) (0x[0-9a-f]+|\d+)\b", header)
    }
    structs: dict[str, Any] = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header, re.MULTILINE | re.DOTALL):
        fields = []
        for type_name, field, count in re.findall(
            r"^    (?:struct )?(\w+) (\w+)(?:\[(\w+)\])?;", body, re.MULTILINE
        ):
            kind = structs.get(type_name) or SCALARS[type_name]
            fields.append(
                (field, kind * (numbers[count] if count in numbers else int(count)) if count else kind)
            )
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs, numbers


@functools.cache
def loaded(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.sim_open.restype = ctypes.c_void_p
    library.sim_open.argtypes = [ctypes.c_char_p]
    for name in ("sim_close", "sim_lock", "sim_commit", "sim_unlock"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = None
    library.sim_now.restype = ctypes.c_int64
    library.sim_enforced_mw.restype = ctypes.c_uint32
    library.sim_function_name.restype = ctypes.c_char_p
    library.sim_state_size.restype = ctypes.c_uint64
    for name in ("sim_power_watts", "sim_energy_joules", "sim_celsius", "sim_average_watts"):
        getattr(library, name).restype = ctypes.c_double
    return library


@functools.cache
def function_numbers(path: Path) -> Mapping[str, int]:
    library = loaded(path)
    numbers: dict[str, int] = {}
    while name := library.sim_function_name(len(numbers)):
        numbers[name.decode()] = len(numbers)
    return numbers


def assign(struct: Any, name: str, value: Any) -> None:
    """Write one field of a struct by its name in sim.h; a sequence fills an array from its start."""
    if not hasattr(struct, name):
        raise AttributeError(f"sim.h has no field {name!r} in {type(struct).__name__}")
    if isinstance(value, (list, tuple)):
        array = getattr(struct, name)
        for place, item in enumerate(value):
            array[place] = item
    else:
        setattr(struct, name, value.encode() if isinstance(value, str) else value)
