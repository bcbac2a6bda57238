"""`python -m bench [NAME ...] [--rounds N]`: run benchmarks; exit status 1 if a target is missed."""

from __future__ import annotations

import argparse
import importlib
import sys

NAMES = (
    *("startup", "kernels", "columns", "loading", "reading", "streaming", "harvest", "dictionaries"),
    *("steering", "decode", "shrink", "patching", "sparsity-rules", "quantize"),
)


def main() -> int:
    """Run the benchmarks that were named, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds per benchmark (default: 5)")
    args = parser.parse_args()
    wrong = [name for name in args.names if name not in NAMES]
    if wrong:
        parser.error(f"no benchmark is called {wrong[0]!r}; there are {', '.join(NAMES)}")
    modules = [f"bench.{name.replace('-', '_')}" for name in args.names or NAMES]
    met = [importlib.import_module(module).main(args.rounds) for module in modules]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
