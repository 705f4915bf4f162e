"""The cases of the benchmarks as pytest-benchmark entry points.

    pytest benchmarks --benchmark-only                               # a small shape
    pytest benchmarks --benchmark-only --moe-shape olmoe -k "ours"   # a real one

They time one provider after another. For ratios use bench_moe_mlp.py, which interleaves them.
"""

import bench_dispatch
import bench_lora_linear
import pytest
import torch
from bench_moe_mlp import default_providers
from lib.cases import DTYPES, Case, make_problem
from lib.check import Oracle
from lib.providers import set_up_provider
from lib.runs import prepare


@pytest.fixture(params=DTYPES)
def problem(request):
    return make_problem(Case.named(request.config.getoption("moe_shape"), dtype=request.param))


def warm_runner(set_up, problem, error_of):
    record, runners = prepare(lambda: [set_up(problem)], error_of)
    if not runners:
        pytest.skip(record["missing"])
    assert record["error"] is None
    return runners[0]


def forward_backward(runner, grad_out):
    runner.backward(runner.forward(), grad_out)
    runner.clear()


@pytest.mark.parametrize("provider", default_providers("both"))
def test_moe_mlp(benchmark, problem, provider):
    runner = warm_runner(
        lambda problem: set_up_provider(provider, problem), problem, Oracle(problem).error
    )
    benchmark(forward_backward, runner, problem.grad_out)


@pytest.mark.parametrize("provider", default_providers("decode"))
def test_decode(benchmark, problem, provider):
    with torch.no_grad():
        runner = warm_runner(
            lambda problem: set_up_provider(provider, problem),
            problem,
            lambda runner: Oracle(problem).error(runner, backward=False),
        )
        benchmark(runner.forward)


@pytest.mark.parametrize("provider", bench_lora_linear.PROVIDERS)
def test_lora_linear(benchmark, provider):
    problem = bench_lora_linear.Problem(bench_lora_linear.Case(tokens=256, features=128))
    runner = warm_runner(bench_lora_linear.PROVIDERS[provider], problem, problem.error)
    benchmark(forward_backward, runner, problem.grad_out)


@pytest.mark.parametrize("provider", bench_dispatch.PROVIDERS)
def test_dispatch(benchmark, provider):
    problem = bench_dispatch.Problem(bench_dispatch.Case(tokens=256))
    runner = warm_runner(bench_dispatch.PROVIDERS[provider], problem, problem.error)
    benchmark(runner.forward)
