"""Benchmarks: one module per figure, each variant in a process of its own, interleaved, medians.

    python -m bench                     # all
    python -m bench reading kernels     # some
    python -m bench reading --rounds 9

Every run prints a table (target, measured, met or missed) and writes `bench/results/<name>.json` with
the command and the environment. Timings are read as ratios inside one run; machines differ.
"""
