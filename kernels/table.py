"""The work table that host and kernels share: what a row and a tile hold, and the counters of the queue.

A row is one matrix (one part of a parameter) or one vector, FIELDS int64 numbers; a tile is TILE int32 numbers:
(what to do, row, which strip or block of it, iteration). Rows hold addresses and are uploaded when one changes; tiles
hold none and stay.
"""

from __future__ import annotations

import triton.language as tl

FIELDS = tl.constexpr(27)
WEIGHT = tl.constexpr(0)  # address of the row's first element
GRADIENT = tl.constexpr(1)  # the same of its gradient; 0: none
ROWS = tl.constexpr(2)  # m; 1 for a vector
COLUMNS = tl.constexpr(3)  # n
PADDED = tl.constexpr(4)  # n rounded up to PAD: the stride of partial sums
W_ROW = tl.constexpr(5)  # strides in elements
W_COLUMN = tl.constexpr(6)
W_ORDER = tl.constexpr(7)  # dense rows: address of n int32, the column at each place; 0: its own
W_PLACES = tl.constexpr(8)  # other rows: address of n int32, the place of each column; 0: column * W_COLUMN
G_ROW = tl.constexpr(9)  # the same four of the gradient
G_COLUMN = tl.constexpr(10)
G_ORDER = tl.constexpr(11)
G_PLACES = tl.constexpr(12)
V_AT = tl.constexpr(13)  # first element in v
U_AT = tl.constexpr(14)  # first element in u, and in the workspace's y
INDEX = tl.constexpr(15)  # in sigma and exponents
PARTIAL_AT = tl.constexpr(16)  # in the workspace: PARTIALS x PADDED sums, the strips' shares of z
Z_AT = tl.constexpr(17)  # in the workspace: PADDED
SUMS_AT = tl.constexpr(18)  # in the float64 sums: (||z||^2, ||y||^2) of each block
TERM_AT = tl.constexpr(19)  # in the float64 sums: TERMS numbers, below
STRIPS = tl.constexpr(20)
STRIP_ROWS = tl.constexpr(21)
BLOCKS = tl.constexpr(22)  # of columns, in combining
TARGET = tl.constexpr(23)  # float64 bits
SCALE = tl.constexpr(24)  # float64 bits: this parameter's share of the strength
PARTIALS = tl.constexpr(26)  # shares of z: strips times what each leaves, up to MOST_SHARES
KIND = tl.constexpr(25)  # spectral_ops/ops/layout.py: Kind

# What a step leaves of a row: (coefficient of the gradient, term of R, ||y||, ||z||), the norms with no power of two.
TERMS = 4
COEFFICIENT = tl.constexpr(0)
TERM = tl.constexpr(1)
Y_NORM = tl.constexpr(2)
Z_NORM = tl.constexpr(3)

TILE = tl.constexpr(4)

# Rows of the optimizer step (kernels/adamw.py) go on with these. Moments and masters lie in memory as their weight.
ADAMW_FIELDS = tl.constexpr(37)
EXP_AVG = tl.constexpr(27)  # addresses of the row's first element; 0: none
EXP_AVG_SQ = tl.constexpr(28)
MAX_EXP_AVG_SQ = tl.constexpr(29)
MASTER = tl.constexpr(30)
STEP = tl.constexpr(31)  # address of the count of steps
STEP_WIDE = tl.constexpr(32)  # 1: it is float64
COUNTS = tl.constexpr(33)  # 1: this row of the parameter adds one to it
GROUP = tl.constexpr(34)  # its parameter group
NUMBER = tl.constexpr(35)  # of its parameter in the call
PLACE = tl.constexpr(36)  # of its first element in the parameter's memory

# A strip leaves at most so many shares of z, of its warps; they are summed with those of the other strips.
MOST_SHARES = tl.constexpr(4)

# Partial sums begin on 32 bytes, so that they are read and written in vectors.
PAD = 8

# Counters: ticket, exits, then per row. Strips read and blocks combined count on over the iterations of a launch.
TICKET = tl.constexpr(0)
EXITS = tl.constexpr(1)
STOPPED = tl.constexpr(2)  # debug: 1 + the ticket that waited in vain
FIRST_COUNTER = tl.constexpr(4)
COUNTERS = tl.constexpr(4)  # per row
READS = tl.constexpr(0)
COMBINED = tl.constexpr(1)
FINISHED = tl.constexpr(2)

# What a tile asks for; to READ_TILE the number of a read variant is added, to GRADIENT_TILE of a gradient variant.
COMBINE_TILE = tl.constexpr(0)
VECTOR_TILE = tl.constexpr(1)
PLAIN_TILE = tl.constexpr(2)  # of the optimizer step: elements without a term of R
READ_TILE = tl.constexpr(16)
GRADIENT_TILE = tl.constexpr(64)

# How rows are read or written. Variants are tuples (mode, A, pieces, P, aligned[, copies]), see kernels/strips.py.
ONE_SWEEP = tl.constexpr(0)  # dense rows of at most pieces * A columns, held in registers
CHUNKED = tl.constexpr(1)  # dense rows of any length, in chunks of A columns, twice: the second time from L2
STRIDED = tl.constexpr(2)  # any strides
BY_COLUMN = tl.constexpr(3)  # columns side by side, as of a transposed weight: strided, with loads along the rows
