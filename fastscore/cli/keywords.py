"""What a network asks for by name, and what a command line gives: compared before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import fx, nn

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_conditions(spec: str, model: nn.Module, given: Mapping[str, object], option: str) -> None:
    """Raise ValueError where a network lacks a condition, or does not take one, or takes a file where a number stands.

    Arguments:
        spec: the model, as the command line names it.
        model: the network, called as `model(x_t, t, **given)`; one that takes any keyword may take these.
        given: the conditions.
        option: that gives them, such as "--cond".
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return
    known = {p.name: p.default is p.empty for p in parameters[2:] if p.kind in _BY_NAME}
    listed = f"it takes {', '.join(known)}" if known else "it takes none"
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{spec} takes no condition {name!r}; {listed}; drop {option} {name}=...")
        if isinstance(model, fx.GraphModule) and isinstance(value, int | float):
            raise ValueError(
                f"condition {name!r} of {spec} was exported as a tensor, got the number {value}; give it as a file, "
                f"{option} {name}=FILE"
            )
    missing = [name for name, required in known.items() if required and name not in given]
    if missing:
        names = ", ".join(repr(name) for name in missing)
        raise ValueError(
            f"{spec} needs the condition{'s' * (len(missing) > 1)} {names}, which {option} does not give; add "
            + " ".join(f"{option} {name}=FILE" for name in missing)
        )
