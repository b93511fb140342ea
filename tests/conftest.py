"""Triton kernels run in the interpreter here; the variable has to be set before triton is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
