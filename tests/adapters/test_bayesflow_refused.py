"""bayesflow: what has no density by the formula, and what is told where something is missing."""

import numpy as np
import pytest
import torch
from adapters.test_bayesflow import CONDITION, Approximator, D, approximator, bf, made_exact, network
from torch import nn

from fastscore.adapters import from_bayesflow


def guided():
    made = network()
    made.guidance_function = lambda x_pred, time, score, **more: 2 * score
    return made


def other_loss():
    return network("flow", loss_fn="mae")


def silent():
    """An adapter with a transform that says no determinant, or none at all."""
    transform = bf.Adapter().rename("x", "inference_conditions")
    transform = transform.concatenate(["a", "b"], into="inference_variables")
    transform.transforms.insert(0, Doubled())
    return approximator(made_exact(network("flow")), adapter=transform)


class Doubled(bf.adapters.transforms.Transform):
    def forward(self, data, **more):
        return {name: 2 * value if name in ("a", "b") else value for name, value in data.items()}

    def inverse(self, data, **more):
        return {name: value / 2 if name in ("a", "b") else value for name, value in data.items()}

    def log_det_jac(self, data, log_det_jac, **more):
        return log_det_jac


def untrained():
    whole = Approximator(inference_network=network("flow"), adapter=bf.Adapter())
    whole.build({"inference_variables": (None, D), "inference_conditions": (None, CONDITION)})
    return whole


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "approximator must be a built DiffusionModel or FlowM.* got Linear"),
        (lambda: bf.networks.ConsistencyModel(total_steps=10), TypeError, "got ConsistencyModel; of other networks"),
        (lambda: bf.networks.CouplingFlow(), TypeError, "got CouplingFlow; of other networks approximator.log_prob"),
        (lambda: type("DiffusionModel", (), {})(), TypeError, "keras' torch backend, got .*; set KERAS_BACKEND=torch"),
        (lambda: network(build=False), ValueError, "network must be a built one, got a DiffusionModel without weights"),
        (lambda: network("flow", use_optimal_transport=True), ValueError, "use_optimal_transport must be False, .*cou"),
        (lambda: network("flow", base_distribution="student_t"), ValueError, "must be the standard normal one, got D"),
        (other_loss, ValueError, "loss_fn must be the mean squared error, whose least is a mean, got mean_absolute"),
        (guided, ValueError, "guidance_function must be the library's, since guided scores have no density, got"),
        (untrained, ValueError, "approximator must be a trained one, got one whose standardization has seen no data"),
        (silent, ValueError, "the adapter's log-determinant must be that of its map, got 0 where .* 2.7"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(make, error, message):
    with pytest.raises(error, match=message):
        from_bayesflow(make())


def test_conditions_are_asked_for():
    made, theta = network(), torch.zeros(3, D)
    with pytest.raises(ValueError, match="condition must be an observation, got none; give from_bayesflow the data"):
        from_bayesflow(made).estimate(theta, nfe=8)
    with pytest.raises(ValueError, match=r"condition must be no condition, without which .*, got one of shape"):
        from_bayesflow(network(condition=False)).estimate(theta, nfe=8, condition=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"condition must be one observation of shape \(2,\), .* got \(5, 2\);"):
        from_bayesflow(made).estimate(theta, nfe=8, condition=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="data must be one observation, arrays of first size 1, got 5; give several"):
        from_bayesflow(made, torch.zeros(5, 2))
    with pytest.raises(TypeError, match=r"data must be arrays by name, .*, got list; give a dict"):
        from_bayesflow(made, [0.0])
    with pytest.raises(ValueError, match="a network alone knows no names; give from_bayesflow the approximator"):
        from_bayesflow(made, {"x": np.zeros((1, 2))})


def test_parameters_left_without_noise_in_training_are_warned_of():
    made = network("flow")
    if hasattr(made, "mask_handler"):
        made.mask_handler.fixed_target_prob = 0.25
    else:
        made.drop_target_prob = 0.25
    with pytest.warns(UserWarning, match="trained with a share of 0.25 of its parameters left without noise"):
        from_bayesflow(made)
