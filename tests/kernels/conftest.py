"""Compiling for TPUs takes libtpu, which only Linux has: elsewhere these files are left out."""

import importlib.util
import sys

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
if sys.platform == "linux" and not HAS_LIBTPU:
    raise ImportError("no libtpu: install the tests' requirements, pip install '.[test]'")
collect_ignore = [] if HAS_LIBTPU else ["test_tpu_compile.py", "test_cycles.py"]
