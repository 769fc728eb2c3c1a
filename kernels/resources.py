"""Offline proof of what the kernels compile to: no GPU and no driver are needed.

    python -m meru_fast.kernels.resources                     compile everything, print the table
    python -m meru_fast.kernels.resources --write             and store it as kernels/resources.csv
    python -m meru_fast.kernels.resources --arch sm_90 --only contrastive

Every kernel module lists what it ships in ``compile_specs() -> list[CompileSpec]``: one entry per kernel and launch
configuration worth watching. ``measure`` compiles an entry for an architecture with the compiler and assembler inside
the triton package and reads registers, spills, shared memory and instruction counts out of the result.
"""

import argparse
import csv
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
MODULES = ("exp_map", "distance", "contrastive", "entailment", "topk")
TABLE = Path(__file__).with_name("resources.csv")


@dataclass(frozen=True)
class CompileSpec:
    """One kernel in one launch configuration.

    Attributes:
        name: ``kernel[variant]``, unique, the key of the table.
        kernel: the ``@triton.jit`` function.
        signature: type of every run-time argument, e.g. ``{"x": "*fp32", "rows": "i32"}``.
        constexprs: value of every ``tl.constexpr`` argument.
        divisible: run-time arguments known to be divisible by 16 (pointers, row strides); without it, vector loads and
            asynchronous copies are lost.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        outputs: elements one program makes per pass through the kernel (logits of a tile), for instructions per output;
            0 where that says nothing.
        architectures: where it runs.
        maxnreg: register limit of a thread, None for the compiler's choice.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    outputs: int = 0
    architectures: tuple[str, ...] = field(default_factory=lambda: tuple(ARCHITECTURES))
    maxnreg: int | None = None


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture. ``-1`` marks a figure that does not exist there."""

    name: str
    arch: str
    registers: int  # per thread
    spills: int  # local loads and stores in SASS
    stack: int  # bytes per thread
    shared: int  # bytes per program
    mma: int  # wgmma (sm_90), tcgen05.mma (sm_100) or mma.sync (sm_80) instructions
    wait_depth: int  # deepest wgmma.wait_group (sm_90): 0 means products do not overlap with anything
    async_copies: int  # cp.async and TMA instructions
    instructions: int  # SASS instructions in all
    per_output: float  # SASS instructions per output of a thread, -1 without `outputs`
    programs_per_sm: int


# per SM: shared memory a program may share out, and what a program reserves on top
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
RESERVED_SHARED, REGISTERS_PER_SM, WARPS_PER_SM = 1024, 65536, 64


def specs(only: str = "") -> list[CompileSpec]:
    """All entries whose name contains ``only``."""
    found = []
    for module in MODULES:
        found += importlib.import_module(f"{__package__}.{module}").compile_specs()
    return [spec for spec in found if only in spec.name]


def compile_spec(spec: CompileSpec, arch: str) -> Any:
    """The compiled kernel; ``.asm["ptx"]``, ``.asm["cubin"]``, ``.metadata.shared``.

    Raises:
        RuntimeError: in a process where Triton interprets its kernels.
        ValueError: the entry does not describe the kernel's arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    names = list(spec.kernel.arg_names)
    unknown = set(names) ^ (set(spec.signature) | set(spec.constexprs))
    if unknown:
        raise ValueError(f"{spec.name}: arguments missing or unknown: {', '.join(sorted(unknown))}")
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    source = ASTSource(spec.kernel, signature, {(names.index(k),): v for k, v in spec.constexprs.items()}, attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    if spec.maxnreg:
        options["maxnreg"] = spec.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=options)


def measure(spec: CompileSpec, arch: str) -> Resources:
    """Compile an entry for ``"sm_80"``, ``"sm_90"`` or ``"sm_100"`` and read its resources."""
    compiled = compile_spec(spec, arch)
    ptx = compiled.asm["ptx"]
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE)
    body = [opcode for opcode in opcodes if opcode.split(".")[0] not in ("NOP", "BRA")]
    waits = [int(depth) for depth in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)]
    shared = compiled.metadata.shared
    threads = 32 * spec.num_warps
    return Resources(
        name=spec.name,
        arch=arch,
        registers=registers,
        spills=sum(opcode.split(".")[0] in ("STL", "LDL") for opcode in body),
        stack=stack,
        shared=shared,
        mma=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma\.|mma\.sync\.aligned", ptx)),
        wait_depth=max(waits, default=-1),
        async_copies=len(re.findall(r"cp\.async\.(?:c[ag]|bulk)", ptx)),
        instructions=len(body),
        per_output=round(len(body) * threads / spec.outputs, 1) if spec.outputs else -1,
        programs_per_sm=min(
            REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads),
            SHARED_PER_SM[arch] // (shared + RESERVED_SHARED),
            WARPS_PER_SM // spec.num_warps,
        ),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS, from the ``cuobjdump`` inside triton."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )


def read_table(path: Path = TABLE) -> dict[tuple[str, str], Resources]:
    """The stored table by (name, arch)."""
    kinds = dict(Resources.__annotations__)
    with path.open(newline="") as file:
        rows = [Resources(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]
    return {(row.name, row.arch): row for row in rows}


def write_table(rows: Iterable[Resources], path: Path = TABLE) -> None:
    """Store the table, sorted, so that a change shows as a small diff."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Resources.__annotations__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in sorted(rows, key=lambda row: (row.name, row.arch)))


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m meru_fast.kernels.resources",
        description="Compile every kernel offline; print registers, spills, shared memory, tensor-core instructions, "
        "pipeline depth and SASS instructions per logit. Needs no GPU.",
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="architecture, repeatable; default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="entries whose name contains TEXT, e.g. contrastive")
    parser.add_argument("--write", action="store_true", help=f"store the rows in {TABLE.name}, keeping the others")
    arguments = parser.parse_args(argv)

    columns = list(Resources.__annotations__)
    print(f"{columns[0]:52s}" + "".join(f"{column[:12]:>13s}" for column in columns[1:]))
    rows = []
    for spec in specs(arguments.only):
        for arch in arguments.arch or ARCHITECTURES:
            if arch in spec.architectures:
                rows.append(measure(spec, arch))
                values = vars(rows[-1])
                print(f"{values['name']:52s}" + "".join(f"{values[c]:>13}" for c in columns[1:]), flush=True)
    if not rows:
        sys.exit(f"no entry contains {arguments.only!r}")
    if arguments.write:
        kept = read_table() if TABLE.exists() else {}
        kept.update({(row.name, row.arch): row for row in rows})
        write_table(kept.values())
        print(f"wrote {len(rows)} rows to {TABLE}")


if __name__ == "__main__":
    main()
