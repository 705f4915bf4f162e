"""Times ``lora_linear``, an attention projection with masked low-rank rows, forward and backward.

python benchmarks/bench_lora_linear.py --features 2048 --tokens 1024 --rank 8 16 64
"""

import itertools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from lib.cases import DTYPES, SCALING
from lib.cli import finish, make_sweep_parser, run_cases
from lib.pages.tables import linear_table
from lib.providers.ours import refuse_absent
from lib.providers.runner import Runner
from lib.runs import Options, prepare, timed_training
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_kernels import backends
from moe_kernels.ops import LoraWeights, lora_linear
from moe_kernels.testing import TOLERANCES, relative_rms

NAME = "lora_linear"


@dataclass(frozen=True)
class Case:
    """T rows through a frozen (features, features) layer."""

    tokens: int = 2048
    features: int = 1024
    rank: int = 16
    image_share: float = 0.5
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0


class Problem:
    """The tensors of a case."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*size: int, fan_in: int = 1) -> Tensor:
            tensor = torch.randn(*size, generator=generator) / fan_in**0.5
            return tensor.to(case.device, DTYPES[case.dtype])

        self.case = case
        self.x = randn(case.tokens, case.features)
        self.weight = randn(case.features, case.features, fan_in=case.features)
        self.lora_A = randn(case.rank, case.features, fan_in=case.features).float()
        self.lora_B = randn(case.features, case.rank, fan_in=case.rank).float()
        self.grad_out = randn(case.tokens, case.features)
        num_image = int(case.tokens * case.image_share + 0.5)
        self.modality_ids = torch.zeros(case.tokens, dtype=torch.int64, device=case.device)
        self.modality_ids[torch.randperm(case.tokens, generator=generator)[:num_image]] = 1

    def runner(self, function: Callable, adapters: tuple[Tensor, ...], adapted: str) -> Runner:
        x = self.x.detach().requires_grad_()
        names = ("x", "lora_A", "lora_B")
        leaves = dict(zip(names, (x, *adapters), strict=False))
        return Runner(
            lambda: function(x), leaves=tuple(leaves.values()), adapted=adapted, rounding=2,
            gradients=lambda: {name: leaf.grad for name, leaf in leaves.items()},
        )  # fmt: skip

    def error(self, runner: Runner) -> str | None:
        """Describe a difference from float64 on any row, or return None."""
        out = runner.forward()
        runner.backward(out, self.grad_out)
        leaves = [t.double().requires_grad_() for t in (self.x, self.lora_A, self.lora_B)]
        x, lora_A, lora_B = leaves
        mask = {"none": 0.0, "all": 1.0, "image": self.modality_ids[:, None].double()}
        update = linear(linear(x, lora_A), lora_B) * mask[runner.adapted] * SCALING
        expected = linear(x, self.weight.double()) + update
        expected.backward(self.grad_out.double())
        limit = runner.rounding * TOLERANCES[self.x.dtype]
        references = {"out": expected, "x": x.grad, "lora_A": lora_A.grad, "lora_B": lora_B.grad}
        for name, tensor in ({"out": out} | runner.gradients()).items():
            error = relative_rms(tensor, references[name])
            if not error <= limit:
                return f"{name}: relative RMS error {error:.1e} is above {limit:.1e}"
        return None


def _ours(backend: str) -> Callable[[Problem], Runner]:
    def set_up(problem: Problem) -> Runner:
        refuse_absent(backend)
        adapters = tuple(t[None].requires_grad_() for t in (problem.lora_A, problem.lora_B))
        scaling = torch.tensor([SCALING], device=problem.case.device)
        lora, ids = LoraWeights(*adapters, scaling), problem.modality_ids

        def function(x: Tensor) -> Tensor:
            return lora_linear(x, problem.weight, None, lora, modality_ids=ids, backend=backend)

        return problem.runner(function, adapters, "image")

    return set_up


def _base(problem: Problem) -> Runner:
    """torch's layer alone, as the bound."""
    return problem.runner(lambda x: linear(x, problem.weight), (), "none")


def _split(problem: Problem) -> Runner:
    """Separate products for base and update, with a mask on the (T, r) intermediate."""
    dtype = problem.x.dtype
    adapters = tuple(t.to(dtype).requires_grad_() for t in (problem.lora_A, problem.lora_B))
    scaled_mask = problem.modality_ids[:, None].to(dtype) * SCALING

    def function(x: Tensor) -> Tensor:
        update = linear(linear(x, adapters[0]) * scaled_mask, adapters[1])
        return linear(x, problem.weight) + update

    return problem.runner(function, adapters, "image")


def _peft(problem: Problem) -> Runner:
    """PEFT's ``Linear`` with default options, on all rows."""
    holder, case = nn.Module(), problem.case
    holder.q_proj = nn.Linear(case.features, case.features, bias=False, device="meta")
    holder.q_proj.weight = nn.Parameter(problem.weight, requires_grad=False)
    config = LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, target_modules=["q_proj"])
    layer = get_peft_model(holder, config).base_model.model.q_proj
    adapters = tuple(getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    for adapter, values in zip(adapters, (problem.lora_A, problem.lora_B), strict=True):
        adapter.data.copy_(values)
    return problem.runner(layer, adapters, "all")


PROVIDERS = {
    "base": _base,
    **{f"ours:{name}": _ours(name) for name in backends.NAMES if name != "reference"},
    "split": _split,
    "peft": _peft,
}


def run(case: Case, options: Options) -> dict:
    """Return a record as :func:`lib.runs.run_training` does."""
    problem, records, runners = Problem(case), {}, {}
    for name, set_up in PROVIDERS.items():
        records[name], own = prepare(lambda set_up=set_up: [set_up(problem)], problem.error)
        if own:
            runners[name] = own[0]
    timed_training(records, runners, problem.grad_out, options)
    return {"case": asdict(case), "providers": records}


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_sweep_parser(
        __doc__, NAME, tokens=[2048], features=[1024, 2048], rank=[16], image_share=[0.0, 0.5, 1.0],
        dtype=["bfloat16"],
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    sweep = (args.tokens, args.features, args.rank, args.image_share, args.dtype)
    cases = [Case(*values, args.device, args.seed) for values in itertools.product(*sweep)]
    records = run_cases(args, cases, run)
    print(linear_table(records))
    finish(NAME, args, {"training": records})


if __name__ == "__main__":
    main()
