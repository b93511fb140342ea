"""Type variables of decorators: what a call takes and what it returns stay what they were."""

from __future__ import annotations

from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
