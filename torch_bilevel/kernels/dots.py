"""Matrix products inside kernels, on tensor cores with the accuracy of float32.

    a = a₁ + a₂,  b = b₁ + b₂,   a₁, b₁ rounded to TF32 (11 bits), the rest exact

    a b ≈ a₁ b₁ + a₁ b₂ + a₂ b₁       what is left out, and the rest rounded, is 2⁻²² of the product

Triton's own ``tf32x3`` takes a fifth to a quarter more instructions, because it treats infinities
apart: here they give NaN, as they would one product later.
"""

from __future__ import annotations

from .language import jit, tl


@jit
def split(a):
    """a₁, rounded to the nearest number of 11 bits, and a − a₁."""
    bits = a.to(tl.int32, bitcast=True)
    first = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return first, a - first


@jit
def dot(
    a, b, total, DTYPE: tl.constexpr, PRECISION: tl.constexpr, SHORT: tl.constexpr = 0
):
    """``total + a @ b``; all have the type DTYPE, and PRECISION is Triton's word.

    SHORT: 1 where a, 2 where b is known to have no more than 11 bits: its rest is zero.
    """
    if PRECISION == "tf32x3":
        if SHORT == 1:
            first = a
        else:
            first, rest = split(a)
        if SHORT == 2:
            first_b = b
        else:
            first_b, rest_b = split(b)
        if SHORT != 1:
            total = tl.dot(rest, first_b, total, input_precision="tf32")
        if SHORT != 2:
            total = tl.dot(first, rest_b, total, input_precision="tf32")
        total = tl.dot(first, first_b, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=DTYPE)
    return total
