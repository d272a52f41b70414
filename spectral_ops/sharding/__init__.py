"""Sharded parameters (DTensor: FSDP2, HSDP, tensor parallel): every rank reads its own shard, sums go round once.

    mesh.py      what a rank holds of a parameter, and the ranks that hold the rest
    pieces.py    the matrices and vectors in that, however packed layers straddle ranks
    read.py      the warm step: local read, all-reduce, the same sigma and v on every rank
    start.py     the converged start
    group.py     what the regularizer calls

No weight is gathered. Formulas: docs/design.md, section 7.
"""
