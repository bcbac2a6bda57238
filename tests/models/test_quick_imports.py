"""Quick imports: the same libraries, sooner, and nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import actlas
from actlas.models.quick_imports import quick_imports


def run(code: str, *arguments: str) -> str:
    """Run Python code in a new process; what it prints."""
    # where two files export one name, the order of a set decides in transformers itself
    environment = {**os.environ, "PYTHONPATH": str(Path(actlas.__file__).parents[1]), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_collector_and_the_import_machinery_are_as_before() -> None:
    finders = list(sys.meta_path)
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() and sys.meta_path == finders
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_transformers_imported_quickly_exports_the_same() -> None:
    code = """
import contextlib, hashlib, sys
from actlas.models.quick_imports import quick_imports
with quick_imports() if sys.argv[1] == "quick" else contextlib.nullcontext():
    import transformers
    import transformers.models
from transformers.utils import import_utils
names = [sorted(map(str, m._class_to_module.items())) for m in (transformers, transformers.models)]
names.append(sorted(map(str, transformers._object_missing_backend.items())))
print(hashlib.sha256(repr(names).encode()).hexdigest(), import_utils.fetch__all__.__module__)
"""
    quick = run(code, "quick")
    assert quick == run(code, "plain") and quick.split()[1] == "transformers.utils.import_utils"


def test_scipy_optimize_comes_late_but_comes() -> None:
    code = """
import sys
from actlas.models.quick_imports import quick_imports
with quick_imports():
    from scipy.optimize import linear_sum_assignment
    early = "scipy.optimize._optimize" in sys.modules
assert "scipy.optimize" not in sys.modules
rows, columns = linear_sum_assignment([[2, 1], [1, 5]])
import scipy.optimize
print(early, columns.tolist(), scipy.optimize.linear_sum_assignment is not linear_sum_assignment)
"""
    assert run(code) == "False [1, 0] True\n"


def test_whoever_wants_more_of_scipy_optimize_gets_the_real_one() -> None:
    code = """
from actlas.models.quick_imports import quick_imports
with quick_imports():
    from scipy.optimize import linear_sum_assignment, minimize
    import scipy.optimize
    print(minimize is scipy.optimize.minimize, scipy.optimize.__file__ is not None)
import scipy
print(scipy.optimize.minimize is minimize)
"""
    assert run(code) == "True True\nTrue\n"
