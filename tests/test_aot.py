"""What every kernel compiles to for sm_90, without a GPU: no spills, wide loads, limits kept."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_bilevel import kernels

HERE = Path(__file__).parent
SHARED = 227 * 1024  # bytes a program can have on sm_90
REGISTERS = 255  # a thread


def missing():
    """Why kernels cannot be compiled and read here, or None."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return "Triton is not installed"
    tool = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    return None if tool.exists() else "this Triton has no cuobjdump"


def compiled(folder):
    """Rows of the table of `aot`, from a process outside Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, HERE / "aot.py", "--json", folder / "found.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def faults(row):
    """What is wrong with one kernel."""
    if row["spills"]:
        yield f"{row['spills']} spills"
    if row["shared"] > SHARED:
        yield f"{row['shared']} bytes of shared memory"
    if row["registers"] > REGISTERS:
        yield f"{row['registers']} registers"
    if not row["loads"]["128"] and "ones" not in row["name"]:
        yield f"no 128-bit load: {row['loads']}"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_no_kernel_spills_and_all_load_128_bits(tmp_path):
    """One test: one process compiles all of them, a minute on one core."""
    rows = compiled(tmp_path)
    wrong = [f"{row['name']}: {fault}" for row in rows for fault in faults(row)]
    assert not wrong, "\n".join(wrong)
    written = {
        f"{kernels.__name__}.{path.stem}.{name}"
        for path in Path(kernels.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {row["kernel"] for row in rows} == written
