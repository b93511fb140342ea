"""The compiled kernels on a GPU, against the torch backend in float64 with the same rounding of operands.

What they do on a machine without one is tested by tests/emulator, on the same cases; `make gpu-check` runs this.
"""

import pytest
import torch
from emulator.comparison import Case, Problem
from emulator.test_density_mlp import CASES
from emulator.test_steps import CASES as CASES_UP_TO_512
from emulator.test_steps_1024 import FEW

import fastscore as fs
from fastscore.ops import cuda, cuda_steps, select
from fastscore.ops.steps import Steps

REASON = select._cuda_why_not(torch.device("cuda:0"), torch.float32)
CASES_OF_STEPS = CASES_UP_TO_512 | {1024: list(FEW)}
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"compiled kernels: {REASON}")


def run(problem: Problem, cluster: int = 0, splits: int = 0, clusters: int = 0) -> torch.Tensor:
    problem.f.fill_(float("nan"))
    stream = torch.cuda.current_stream().cuda_stream
    cuda.launch(select.native(), problem.packed, problem.f, 0, stream, cuda.Config(cluster, splits, clusters))
    return problem.f.clone()


def problem_of_steps(case: Case) -> Problem:
    limits = cuda._device(torch.device("cuda:0"))
    return Problem(case, "cuda", lambda *program: cuda_steps.fitting(*program, select.native(), limits))


def assert_close(case: Case, problem: Problem) -> None:
    # The hardware's tanh is off by up to 2^-11, so operands round otherwise in places: 2^-9 each, at random, through
    # all products; twice the root of their sum, of the mean square.
    error = problem.errors().error.square().mean().sqrt()
    assert float(error) < 2 * (2 * case.maps * case.depth + 2) ** 0.5 * 2.0**-9, (case, float(error))


@pytest.mark.parametrize("hidden", CASES)
def test_every_case_agrees_with_the_definition(hidden):
    capability, shared = cuda._device(torch.device("cuda:0"))
    ran = 0
    for case in CASES[hidden]:
        problem = Problem(case, "cuda")
        stride = problem.packed.tables[0].shape[-1]
        if isinstance(select.native().plan(*problem.packed.shape, stride, capability, shared), str):
            continue
        run(problem)
        assert_close(case, problem)
        ran += 1
    assert ran > 0 or capability != 90


@pytest.mark.parametrize("hidden", CASES_OF_STEPS)
def test_every_case_of_steps_agrees_with_the_definition(hidden):
    ran = 0
    for case in CASES_OF_STEPS[hidden]:
        problem = problem_of_steps(case)
        if isinstance(problem.steps, Steps):
            run(problem)
            assert_close(case, problem)
            ran += 1
    assert ran > 0 or cuda._device(torch.device("cuda:0"))[0] != 90


@pytest.mark.parametrize("hidden", CASES_OF_STEPS)
def test_steps_repeat_to_the_bit_and_in_a_graph(hidden):
    problem = problem_of_steps(Case(hidden, 64, 3, 450, 5, maps=2))
    if isinstance(problem.steps, str):
        pytest.skip(problem.steps)
    first = run(problem)
    for clusters in (1, 2, 7, 50):
        assert run(problem, clusters=clusters).equal(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.launch(select.native(), problem.packed, problem.f, 0, torch.cuda.current_stream().cuda_stream)
    problem.f.fill_(float("nan"))
    graph.replay()
    assert problem.f.equal(first)


@pytest.mark.parametrize("case", [Case(64, 64, 3, 63, 5), Case(128, 13, 6, 450, 5), Case(256, 64, 3, 300, 3)])
def test_launches_repeat_to_the_bit_and_in_a_graph(case):
    problem = Problem(case, "cuda")
    if isinstance(select.native().plan(*problem.packed.shape, 0, *cuda._device(torch.device("cuda:0"))), str):
        pytest.skip("no kernel of this width here")
    first = run(problem)
    for cluster, splits in ((1, 1), (2, 3), (4, 5)):
        assert run(problem, cluster, splits).equal(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.launch(select.native(), problem.packed, problem.f, 0, torch.cuda.current_stream().cuda_stream)
    problem.f.fill_(float("nan"))
    graph.replay()
    assert problem.f.equal(first)


def test_an_estimate_is_tritons_up_to_its_rounding():
    from real_networks import MARHead

    torch.manual_seed(0)
    network = MARHead(13, 64, 3)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
    network, x = network.bfloat16().eval().cuda(), torch.randn(100, 13, device="cuda")
    found, expected = (
        fs.ScoreDensity(network, fs.VP(), "eps", backend=name).estimate(x, nfe=64).log_prob
        for name in ("cuda", "triton")
    )
    scale = expected.abs() + expected.abs().mean()
    assert float(((found - expected).abs() / scale).max()) < 4 * 8**0.5 * 2.0**-9
