"""Implementations of the ops in `fastscore.ops`, and the choice between them."""

import os


def interpreting() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
