"""Whether Triton runs in its interpreter."""

import os


def interpreting() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
