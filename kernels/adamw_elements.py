"""AdamW's step of elements, with a gradient p of the penalty; formulas and their order as in csrc/adamw_kernels.cpp.

    g = g / grad_scale (+ p)     w = w (1 - lr decay) (- lr p)     m += (1 - b1) (g - m)     s = b2 s + (1 - b2) g g
    w -= lr / (1 - b1^t) m / (sqrt(s) / sqrt(1 - b2^t) + eps)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import EXP_AVG, EXP_AVG_SQ, GRADIENT, GROUP, MASTER, MAX_EXP_AVG_SQ, NUMBER, PLACE, STEP, STEP_WIDE, WEIGHT
from .terms import float64_field, lowbias32

# What the host fills in for each parameter group, as int64: float64 bits, then addresses of 0-d tensors that go before
# them (0: none) and whether these are float64.
GROUP_FIELDS = 10
GROUP_STRIDE = tl.constexpr(GROUP_FIELDS)
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
STRENGTH = tl.constexpr(5)
LR_AT = tl.constexpr(6)
LR_WIDE = tl.constexpr(7)
STRENGTH_AT = tl.constexpr(8)
STRENGTH_WIDE = tl.constexpr(9)

@triton.jit
def number_at(address, wide):
    """A 0-d tensor, float32 or float64, as float64."""
    found = tl.full((), 0.0, tl.float64)
    if wide != 0:
        found += tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        found += tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return found


@triton.jit
def group_number(group, FIELD: tl.constexpr, AT: tl.constexpr, WIDE: tl.constexpr):
    found = float64_field(group + FIELD)
    address = tl.load(group + AT)
    if address != 0:
        found = number_at(address, tl.load(group + WIDE))
    return found


@triton.jit
def strength_of(row, groups):
    return group_number(groups + tl.load(row + GROUP) * GROUP_STRIDE, STRENGTH, STRENGTH_AT, STRENGTH_WIDE)


@triton.jit
def beta_to_the(beta, t):
    return tl.where(beta == 0.0, 0.0, tl.exp2(t * tl.log2(beta)))


@triton.jit
def factors_of(row, groups, grad_scale, seed, MAXIMIZE: tl.constexpr):
    """What is the same for all elements of a parameter, float32, and the key of its chance."""
    group = groups + tl.load(row + GROUP) * GROUP_STRIDE
    lr = group_number(group, LR, LR_AT, LR_WIDE)
    beta1 = float64_field(group + BETA1)
    beta2 = float64_field(group + BETA2)
    t = number_at(tl.load(row + STEP), tl.load(row + STEP_WIDE)) + 1.0
    scale = tl.full((), -1.0 if MAXIMIZE else 1.0, tl.float64)
    if grad_scale is not None:
        scale /= tl.load(grad_scale).to(tl.float64)
    key = lowbias32(lowbias32((tl.load(row + NUMBER) + seed).to(tl.uint32)) + t.to(tl.int64).to(tl.uint32))
    return (
        scale.to(tl.float32),
        (1.0 - lr * float64_field(group + DECAY)).to(tl.float32),
        lr.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (1.0 / tl.sqrt(1.0 - beta_to_the(beta2, t))).to(tl.float32),
        float64_field(group + EPS).to(tl.float32),
        (lr / (1.0 - beta_to_the(beta1, t))).to(tl.float32),
        key,
    )


@triton.jit
def advance(w, g, m, s, top, p, f, AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr):
    """(w, m, s, top) of elements after a step, float32; p: the penalty's gradient."""
    scale, decay, lr, beta1_rest, beta2, beta2_rest, inverse_sqrt_bias2, eps, step_size, _ = f
    g = g * scale
    if not DECOUPLED:
        g += p
    w = w * decay
    if DECOUPLED:
        w -= lr * p
    m += beta1_rest * (g - m)
    s = beta2 * s + beta2_rest * g * g
    if AMSGRAD:
        top = tl.where(top > s, top, s)
    else:
        top = s
    w -= tl.math.div_rn(step_size * m, tl.math.sqrt_rn(top) * inverse_sqrt_bias2 + eps)
    return w, m, s, top


@triton.jit
def rounded(w, place, key, DTYPE: tl.constexpr, BY_CHANCE: tl.constexpr):
    """w as it is stored; by chance as ops/adamw_ref.py: round_by_chance."""
    if BY_CHANCE:
        bits = w.to(tl.uint32, bitcast=True)
        added = bits + (lowbias32(place.to(tl.uint32) * 0x9E3779B9 + key) >> 16)
        overflows = (added & 0x7F800000) == 0x7F800000  # what is finite stays so
        cut = tl.where(overflows, bits, added) & 0xFFFF0000
        finite = (bits & 0x7F800000) != 0x7F800000
        w = tl.where(finite, cut.to(tl.float32, bitcast=True), w)
    return w.to(DTYPE)


@triton.jit
def first_of(row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The row's first element in one of its arrays.

    16-bit ones are said to lie on 8 bytes only: then a thread takes 4 elements of every array, and nothing goes through
    shared memory to meet its moments.
    """
    first = tl.load(row + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        first = tl.multiple_of(first, DTYPE.primitive_bitwidth // 2)
    return first


@triton.jit
def given_of(row, n):
    """How many of n columns have a gradient: all or none."""
    return tl.where(tl.load(row + GRADIENT) != 0, n, 0)


@triton.jit
def update_elements(
    row,
    at,
    mask,
    given,
    p,
    f,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BY_CHANCE: tl.constexpr,
):
    """A step of the elements at places `at` (int64, from the row's first one on); the new weights, as stored.

    given: mask of those that have a gradient; the others' counts as zero.
    """
    w = first_of(row, WEIGHT, W_DTYPE, ALIGNED)
    master = first_of(row, MASTER, tl.float32, ALIGNED)
    average = first_of(row, EXP_AVG, tl.float32, ALIGNED)
    square = first_of(row, EXP_AVG_SQ, tl.float32, ALIGNED)
    highest = first_of(row, MAX_EXP_AVG_SQ, tl.float32, ALIGNED)
    if MASTERS:
        old = tl.load(master + at, mask=mask, other=0.0)
    else:
        old = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(first_of(row, GRADIENT, G_DTYPE, ALIGNED) + at, mask=given, other=0.0).to(tl.float32)
    m = tl.load(average + at, mask=mask, other=0.0)
    s = tl.load(square + at, mask=mask, other=0.0)
    top = s
    if AMSGRAD:
        top = tl.load(highest + at, mask=mask, other=0.0)
    new, m, s, top = advance(old, g, m, s, top, p, f, AMSGRAD, DECOUPLED)
    tl.store(average + at, m, mask=mask)
    tl.store(square + at, s, mask=mask)
    if AMSGRAD:
        tl.store(highest + at, top, mask=mask)
    if MASTERS:
        tl.store(master + at, new, mask=mask)
    stored = rounded(new, at + tl.load(row + PLACE), f[9], W_DTYPE, BY_CHANCE)
    tl.store(w + at, stored, mask=mask)
    return stored
