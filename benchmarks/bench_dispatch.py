"""Times ``dispatch``, which sorts routed rows by expert and modality.

python benchmarks/bench_dispatch.py --tokens 1 1024 16384 --experts 64 --top-k 8
"""

import functools
import itertools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from lib.cli import finish, make_sweep_parser, run_cases
from lib.pages.tables import dispatch_table
from lib.providers.ours import refuse_absent
from lib.providers.runner import Runner
from lib.runs import Options, add_seconds, prepare
from lib.timing import now
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import Dispatch, dispatch
from moe_kernels.testing import make_modality_ids, make_routing

NAME = "dispatch"
_CALLS = 20  # in one sample: a call takes microseconds


@dataclass(frozen=True)
class Case:
    tokens: int = 2048
    experts: int = 64
    top_k: int = 8
    routing: str = "balanced"
    device: str = "cpu"
    seed: int = 0


class Problem:
    """Routing and modalities of a case, with half of the rows image and some padding."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(case.seed)
        ids, _ = make_routing(
            case.tokens, case.top_k, case.experts, kind=case.routing, generator=generator
        )
        self.case = case
        self.topk_ids = ids.to(case.device)
        self.modality_ids = make_modality_ids(case.tokens, generator=generator).to(case.device)

    def dispatch(self, backend: str) -> Dispatch:
        return dispatch(
            self.topk_ids, self.case.experts, modality_ids=self.modality_ids, num_modalities=1,
            backend=backend,
        )  # fmt: skip

    def error(self, runner: Runner) -> str | None:
        """Describe a difference from the reference, or return None.

        A competitor's sort is not checked.
        """
        out = runner.forward()
        if not isinstance(out, Dispatch):
            return None
        expected = asdict(self.dispatch("reference"))
        wrong = [key for key, value in asdict(out).items() if not torch.equal(value, expected[key])]
        return f"{', '.join(wrong)} differ from the reference" if wrong else None


def _ours(backend: str) -> Callable[[Problem], Runner]:
    def set_up(problem: Problem) -> Runner:
        refuse_absent(backend)
        return Runner(functools.partial(problem.dispatch, backend))

    return set_up


def _transformers(problem: Problem) -> Runner:
    """The sort in transformers' grouped_mm, which is by expert alone."""
    num_experts = problem.case.experts

    def forward() -> tuple[Tensor, ...]:
        experts, perm = torch.sort(problem.topk_ids.reshape(-1))
        counts = torch.histc(experts.float(), bins=num_experts, min=0, max=num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.numel(), device=perm.device)
        return perm, inverse, offsets

    return Runner(forward)


PROVIDERS = {
    "hf:grouped_mm": _transformers,
    **{f"ours:{name}": _ours(name) for name in backends.NAMES},
}


def _sample(runner: Runner, device: str) -> dict[str, float]:
    started = now(device)
    for _ in range(_CALLS):
        runner.forward()
    return {"forward": (now(device) - started) / _CALLS}


def run(case: Case, options: Options) -> dict:
    """Return a record as :func:`lib.runs.run_training` does, with the mode "forward"."""
    problem, records, steps = Problem(case), {}, {}
    for name, set_up in PROVIDERS.items():
        records[name], own = prepare(lambda set_up=set_up: [set_up(problem)], problem.error)
        if own:
            steps[name] = functools.partial(_sample, own[0], case.device)
    add_seconds(records, options.measure(steps))
    return {"case": asdict(case), "providers": records}


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_sweep_parser(
        __doc__, NAME, tokens=[1, 64, 1024, 16384], experts=[64], top_k=[8], routing=["balanced"]
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    sweep = (args.tokens, args.experts, args.top_k, args.routing)
    cases = [Case(*values, args.device, args.seed) for values in itertools.product(*sweep)]
    records = run_cases(args, cases, run)
    print(dispatch_table(records))
    finish(NAME, args, {"dispatch": records})


if __name__ == "__main__":
    main()
