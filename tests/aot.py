"""Compile every kernel for sm_90 without a GPU, and read what came out of it.

    python tests/aot.py [--json FILE]

prints a table, outside Triton's interpreter. `test_aot` runs it, and looks at the numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_bilevel.kernels import (
    cg_step,
    head_cg,
    joint,
    momentum_step,
    one_pass,
    reduce,
    richardson_step,
    rows,
    sums,
    two_pass,
)
from torch_bilevel.kernels.language import padded

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CLASSES = 16
# arguments of launchers in Triton's words; all others are float32 pointers. Pointers are divisible
# by 16, as PyTorch allocates, and so are integers marked so.
KINDS = {
    "target": "*i64", "flags": "*i32", "flags_out": "*i32", "n": "i32:16", "d": "i32:16",
    "size": "i32:16", "classes": "i32", "count": "i32", "num_steps": "i32",
    "narrow_count": "i32", "narrow_size": "i32", "lines": "i32", "each": "i32:16",
}  # fmt: skip
ANY = {"n": "i32"}  # not divisible by 16
LINK = {"SMOOTHING": 0.0, "SEED_ROWS": 0, "SHARE_ROWS": 0, "LINK": 0, "C": CLASSES}
PRECISE = {"DTYPE": tl.float32, "PRECISION": "tf32x3"}
TF32 = {"DTYPE": tl.float32, "PRECISION": "tf32"}


class Case(NamedTuple):
    """A kernel as a launcher compiles it."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    kinds: dict[str, str] = {}
    options: dict[str, int] = {"num_warps": 4}  # Triton's default


def parted(given: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Meta-parameters, and options of the compiler."""
    options = {k: v for k, v in given.items() if k.startswith("num_")}
    return {k: v for k, v in given.items() if k not in options}, options


def tuned(name: str, kernel: Any, constants: dict[str, Any]) -> list[Case]:
    """One for each configuration."""
    made = []
    for given in kernel.configurations:
        chosen, options = parted(given)
        words = "/".join(map(str, given.values()))
        constants = {**constants, **chosen, "SIZE": 2}
        made.append(
            Case(f"{name} {words}", kernel.function, constants, options=options)
        )
    return made


def two_pass_cases(classes: int, n: int, dtype: torch.dtype) -> list[Case]:
    """The tiles for so many rows."""
    C, made = padded(classes, 16), []
    how, pointer = PRECISE, "*fp32"
    if dtype is torch.float64:
        how, pointer = {"DTYPE": tl.float64, "PRECISION": "ieee"}, "*fp64"
    kernels = two_pass._along_kernel, two_pass._joint_along_kernel
    for count, kernel in enumerate(kernels, 1):
        width = padded(count * classes, 16)
        tiles = {
            kernel: two_pass.forward_tile(n, count * C, dtype),
            two_pass._back_kernel: two_pass.back_tile(n, width, dtype),
        }
        for kernel, tile in tiles.items():
            chosen, options = parted(tile._asdict())
            chosen = {k.upper(): v for k, v in chosen.items()}
            wide = width if kernel is two_pass._back_kernel else C
            constants = {**LINK, **how, **chosen, "C": wide}
            title = f"two_pass {kernel.__name__} {'/'.join(map(str, tile))} of {wide}"
            known = {name: pointer for name in kernel.arg_names if name not in KINDS}
            made.append(Case(title, kernel, constants, known, options))
    return made


def table() -> list[Case]:
    """Every kernel in every configuration; numbers are rows/columns/warps/stages of a tile."""
    found = tuned("one_pass chunked", one_pass.CHUNKED, {**LINK, **PRECISE})
    for columns, kernel in one_pass.RESIDENT_KERNELS.items():
        found += tuned("one_pass resident tf32", kernel, {**LINK, **TF32})
        if columns <= one_pass.PRECISE:
            found += tuned("one_pass resident tf32x3", kernel, {**LINK, **PRECISE})
    found += tuned("joint", joint.JOINT, {**LINK, **PRECISE})
    for classes, n in ((10, 1000), (10, 5000), (10, 60000), (32, 1000)):
        found += two_pass_cases(classes, n, torch.float32)
    found += two_pass_cases(10, 1000, torch.float64)
    between = {**LINK, "BLOCK": rows.BLOCK // CLASSES}
    found.append(Case("rows", rows._rows_kernel, between))
    found.append(Case("joint rows", rows._joint_rows_kernel, between))
    many = {
        **LINK,
        "C": rows.MOST_CLASSES,
        "BLOCK": max(16, rows.BLOCK // rows.MOST_CLASSES),
    }
    found.append(Case("rows, many classes", rows._rows_kernel, many))
    found.append(Case("joint rows, many classes", rows._joint_rows_kernel, many))
    found.append(
        Case(
            "sums",
            sums._sums_kernel,
            {
                "ROWS": sums.ROWS,
                "COLUMNS": sums.COLUMNS,
                "NARROW_ROWS": 128,
                "NARROW": 32,
            },
        )
    )
    block = {"BLOCK": reduce.BLOCK, "PARTS": reduce.PARTS}
    for kernel in (cg_step._inner_products_kernel, cg_step._move_kernel):
        found.append(Case(f"cg {kernel.__name__}", kernel, block, ANY))
    step = {**block, "MOVE": True, "WATCH": True, "TINY": 1e-6}
    found.append(Case("richardson", richardson_step._step_kernel, step, ANY))
    for word, ahead in (("heavy ball", False), ("nesterov", True)):
        kernel = momentum_step._step_kernel
        found.append(Case(word, kernel, {**step, "AHEAD": ahead}, ANY))
    head = {"DAMPING_EACH": 0, "EPS": 1e-7, **LINK, **PRECISE}
    for n in (16, 32, 64):
        chosen = {**head, "N": n, "COLUMNS": 32}
        found.append(Case(f"head samples {n}/32", head_cg._samples_kernel, chosen, ANY))
        for d in (32, head_cg.DIRECT):
            chosen, name = {**head, "N": n, "COLUMNS": d}, f"head direct {n}/{d}"
            found.append(Case(name, head_cg._direct_kernel, chosen, ANY))
    return found + ones(found)


def ones(known: list[Case]) -> list[Case]:
    """One row, one feature, one class: narrow loads, but they must compile."""
    kinds = {"n": "1", "d": "1", "classes": "1"}
    first = {
        case.kernel.__name__ + case.kernel.__module__: case for case in known[::-1]
    }
    return [
        case._replace(name=f"{case.name}, ones", kinds={**case.kinds, **kinds})
        for case in first.values()
        if "classes" in case.kernel.arg_names
    ]


CASES = table()


def build(number: int) -> dict[str, Any]:
    """Registers, spills, shared memory and widths of global loads of one of the cases."""
    case = CASES[number]
    signature, attributes, known = {}, {}, {}
    for place, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], known[(place,)] = "constexpr", case.constants[name]
            continue
        kind = {**KINDS, **case.kinds}.get(name, "*fp32")
        if kind == "1":  # Triton compiles anew for arguments equal to one
            signature[name], known[(place,)] = "constexpr", 1
            continue
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(place,)] = [["tt.divisibility", 16]]
        signature[name] = kind.removesuffix(":16")
    source = ASTSource(case.kernel, signature, known, attributes)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=case.options)
    return {
        "name": case.name,
        "kernel": f"{case.kernel.__module__}.{case.kernel.__name__}",
        "shared": compiled.metadata.shared,
        **disassembled(compiled.asm["cubin"]),
    }


def disassembled(cubin: bytes) -> dict[str, Any]:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [TOOL, "-res-usage", "-sass", file]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
        text = text.stdout
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {
        "registers": int(usage["REG"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)) + int(usage["LOCAL"]),
        "loads": widths(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*", text)),
        "stores": widths(re.findall(r"\bSTG\.E(?:\.\w+)*", text)),
    }


def widths(instructions: list[str]) -> dict[int, int]:
    """How many of each width in bits."""
    found = dict.fromkeys((32, 64, 128), 0)
    for instruction in instructions:
        wide = re.search(r"\.(128|64)\b", instruction)
        found[int(wide[1]) if wide else 32] += 1
    return found


def main() -> None:
    """Build all, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    where = parser.parse_args().json
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(build, range(len(CASES))))
    print(f"{'':42} registers  shared  spills   loads of 32, 64, 128 bits")
    for row in found:
        counts = "".join(f"{count:6}" for count in row["loads"].values())
        numbers = f"{row['registers']:9}{row['shared']:8}{row['spills']:8}"
        print(f"{row['name']:42} {numbers}    {counts}")
    if where:
        where.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
