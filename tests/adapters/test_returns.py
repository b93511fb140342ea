"""What an adapter's docstring and annotation say that it returns is what it returns, and goes through one protocol."""

import inspect
import re

import pytest
from adapters.test_docs import ROWS, SHAPE, TARGET, objects
from torch import nn

from fastscore import adapters
from fastscore.estimator.protocol import Density


def stated(name):
    """Return the class that the docstring names first under Returns."""
    return re.search(r"Returns:\n\s+`(\w+)`", inspect.getdoc(getattr(adapters, name)))[1]


@pytest.mark.parametrize("name", adapters.__all__)
def test_docstring_and_annotation_agree(name):
    assert inspect.signature(getattr(adapters, name)).return_annotation == stated(name)


@pytest.mark.parametrize(
    ("library", "call"), ROWS, ids=[f"{call.partition('(')[0]}-{i}" for i, (_, call) in enumerate(ROWS)]
)
def test_what_comes_back_is_what_is_stated(library, call):
    density = eval(call, vars(adapters) | objects(call))
    assert stated(call.partition("(")[0]) in {base.__name__ for base in type(density).__mro__}
    assert isinstance(density, Density)
    shape = (4,) if call.startswith(("from_sbi", "from_bayesflow")) else SHAPE
    z, log_det = density.to_network(TARGET.sample(3, seed=5).reshape(-1, *shape))
    assert (z.shape, log_det.shape) == ((3, *shape), (3,))
    assert type(density.core).__name__ == "ScoreDensity"


@pytest.mark.parametrize("name", sorted({*adapters.__all__} - {"from_model"}))
def test_what_an_adapter_reads_off_its_objects_is_no_option_and_a_class_no_object(name):
    make = getattr(adapters, name)
    arguments = inspect.signature(make).parameters
    read = {"model", "schedule", "predicts"} - arguments.keys()
    assert len(read) >= 1
    for option in read:
        with pytest.raises(TypeError, match=f"{option} is no option of {name}, which reads it off .*; leave it out"):
            make(nn.Identity(), **{option: "eps"})
    with pytest.raises(TypeError, match="got the class Identity and no object of it; "):
        make(
            *[
                nn.Identity
                for each in arguments.values()
                if each.kind.name != "VAR_KEYWORD" and each.default is each.empty
            ]
        )
