"""Compile specs of the row and tile kernels, from the names of their arguments."""

from typing import Any

from .resources import CompileSpec

FLOATS = ("rim", "aperture_scale")
FEATURES = ("x_ptr", "y_ptr", "dx_ptr", "dy_ptr")  # in the dtype of the features; every other pointer is fp32


def describe(
    name: str, kernel: Any, constexprs: dict[str, Any], *, dtype: str = "fp32", types: dict[str, str] | None = None,
    **options: Any,
) -> CompileSpec:  # fmt: skip
    """The spec of ``kernel`` for features of ``dtype`` whose pointers and strides are multiples of 16."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}" if argument in FEATURES else "*fp32"
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
    signature |= types or {}
    divisible = tuple(a for a in signature if a.endswith(("_ptr", "stride")) or a == "D")
    return CompileSpec(name, kernel, signature, constexprs, divisible, **options)
