"""Networks from the files of `torch.export`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves, tree_unflatten

from .words import first_line


def load_exported(path: str, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """Return the module of an exported program on a device, and the dtype that it takes times in.

    Raises:
        ValueError: for no such file, inputs other than (x_t, t), rows of a fixed or a bounded number, or an export in
            train mode.
    """
    if not zipfile.is_zipfile(path):
        what = "is not a file that torch.export.save wrote" if Path(path).exists() else "does not exist"
        raise ValueError(f"the model {path} {what}; expected a .pt2 file, check the path")
    try:
        program = torch.export.load(path)
    except Exception as error:  # a zip file of something else raises whatever its reader meets first
        raise ValueError(f"the model {path} is not a file that torch.export.save wrote: {first_line(error)}") from error
    names = program.graph_signature.user_inputs
    inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    positional = len(tree_leaves(tree_unflatten(range(len(names)), program.call_spec.in_spec)[0]))
    if positional != 2 or not all(isinstance(value, Tensor) for value in inputs[:2]):
        raise ValueError(
            f"{path} takes the inputs {names[:positional]} by position, expected (x_t, t); export a module whose "
            "forward takes these, and conditions as keyword arguments"
        )
    for name, value in zip(names[:2], inputs):
        batch = value.shape[0] if value.ndim else 0
        if isinstance(batch, int):
            raise ValueError(
                f"{path} was exported for {name} of the fixed shape {tuple(value.shape)}; use {_export(names)}"
            )
        highest = program.range_constraints[batch.node.expr].upper
        if highest < 2**31:
            raise ValueError(
                f"{path} was exported for at most {highest} rows at once; use {_export(names)}, without a max"
            )
    random = [str(node.target) for node in program.graph.nodes if _in_train_mode(node)]
    if random:
        raise ValueError(
            f"{path} was exported in train mode ({random[0]}), which makes its density random; "
            "call model.eval() before torch.export.export"
        )
    if inputs[0].device != device:
        program = move_to_device_pass(program, device)
    return program.module(), inputs[1].dtype


def _export(names: tuple[str, ...]) -> str:
    """Return the call of torch.export that leaves the number of rows open, for inputs of these names."""
    if len(names) == 2:
        each = "{0: torch.export.Dim('batch')}"
        return f"torch.export.export(model, (x_t, t), dynamic_shapes=({each}, {each}))"
    given = ", ".join(f"{name!r}: {name}" for name in names[2:])
    shapes = ", ".join(f"{name!r}: {{0: batch}}" for name in names)
    return (
        f"torch.export.export(model, (x_t, t), {{{given}}}, dynamic_shapes={{{shapes}}}) with batch = "
        "torch.export.Dim('batch')"
    )


def _in_train_mode(node: torch.fx.Node) -> bool:
    """Whether a node is a dropout or a normalization that was traced while training."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    given = {**{a.name: value for a, value in zip(schema.arguments, node.args)}, **node.kwargs}
    return given.get("train", given.get("training")) is True and given.get("p", 1) > 0
