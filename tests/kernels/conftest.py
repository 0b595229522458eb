"""Compiling for TPUs takes libtpu, which not every machine has: without it, these files are left out."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("libtpu") else ["test_tpu_compile.py", "test_cycles.py"]
