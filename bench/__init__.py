"""Benchmarks: one pytest-benchmark file per op, and `python -m bench`, which measures, prints and stores tables.

Measuring (`__main__`, `case`, `timing`, `device`) writes one JSON file; `table`, `compare` and `plot` only read it.
"""
