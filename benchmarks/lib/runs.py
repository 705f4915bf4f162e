"""Runs of providers on one case: set-up, check, memory and interleaved rounds."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lib.cases import Case, Problem, make_problem
from lib.check import Oracle
from lib.memory import peak_bytes, saved_bytes, saved_formula
from lib.providers import OURS, set_up_provider
from lib.providers.runner import Runner, Unavailable
from lib.timing import Clock, GpuClock, measure, now

_MAX_LAYERS = 256  # a toy shape would need millions to read 600 MB


@dataclass(frozen=True)
class Options:
    """The extent of a measurement.

    Attributes:
        rounds: at most.
        min_rounds: of every provider, however long they take.
        max_seconds: for the rounds of a case after those.
        thorough: the providers that run in rounds after ``min_rounds``; None: all.
        memory: the providers whose memory is measured.
        backward: whether to run backward.
        rotated_bytes: bytes of weights that decoding goes through, so that no cache holds them.
        on_round: called after each round.
    """

    rounds: int = 10
    min_rounds: int = 3
    max_seconds: float = 10.0
    thorough: Collection[str] | None = None
    memory: Collection[str] = ()
    backward: bool = True
    rotated_bytes: int = 600_000_000
    on_round: Callable[[], None] = lambda: None

    def measure(self, steps: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict:
        """Call :func:`lib.timing.measure` with these options."""
        return measure(
            steps, min_rounds=min(self.min_rounds, self.rounds), max_rounds=self.rounds,
            max_seconds=self.max_seconds, thorough=self.thorough, on_round=self.on_round,
        )  # fmt: skip


def run_training(case: Case, providers: Sequence[str], options: Options) -> dict:
    """Run forward and backward of one layer, and return a record (see :mod:`lib.records`)."""
    problem = make_problem(case)
    oracle = Oracle(problem)
    records, runners = {}, {}
    for name in providers:
        records[name], runners[name] = prepare(
            lambda name=name: [set_up_provider(name, problem)],
            lambda runner: oracle.error(runner, backward=options.backward),
            ours=name.startswith(OURS),
        )
        if runners[name] and name in options.memory and options.backward:
            records[name]["memory"] = _memory(name, problem, runners[name][0])

    timed_training(
        records, {name: own[0] for name, own in runners.items() if own}, problem.grad_out, options
    )
    return _record([problem], records)


def run_decode(case: Case, providers: Sequence[str], options: Options) -> dict:
    """Run forward under ``no_grad`` through layers whose weights fill ``rotated_bytes``.

    A sample is the mean of one call for each layer. Every layer has its own routing, and one round
    over all layers reads ``rotated_bytes``. The layers share two stacks of weights or more.

    On a GPU the calls are replayed from a CUDA graph if they can be captured, because launching
    them takes longer than they do. "captured" in the record says which were.
    """
    layers = _layers(case, options.rotated_bytes)
    oracle = Oracle(layers[0])
    records, runners = {}, {}
    with torch.no_grad():
        for name in providers:
            records[name], runners[name] = prepare(
                lambda name=name: [set_up_provider(name, layer) for layer in layers],
                lambda runner: oracle.error(runner, backward=False),
                ours=name.startswith(OURS),
            )
        steps = {}
        for name, own in runners.items():
            if own:
                replay = _capture(own) if case.device == "cuda" else None
                records[name]["captured"] = replay is not None
                steps[name] = functools.partial(_decode, own, case.device, replay)
        samples = options.measure(steps)
    add_seconds(records, samples)
    return _record(layers, records)


def _layers(case: Case, rotated_bytes: int) -> list[Problem]:
    stacks = min(max(2, 1 + rotated_bytes // (case.expert_bytes * case.shape.E)), _MAX_LAYERS)
    hit = case.expert_bytes * min(case.rows, case.shape.E)
    calls = min(1 + rotated_bytes // hit, _MAX_LAYERS)
    layers = [make_problem(case, i) for i in range(stacks)]
    return layers + [make_problem(case, i, layers[i % stacks]) for i in range(stacks, calls)]


def prepare(
    set_up: Callable[[], list[Runner]],
    error_of: Callable[[Runner], str | None],
    *,
    ours: bool = False,
) -> tuple[dict, list[Runner]]:
    """Return the start of a provider's record, and its warm runners.

    A provider that fails has no runners and is "missing", with the reason. One of ``ours`` must
    not fail: its exception goes on.
    """
    try:
        runners = set_up()
        error = error_of(runners[0])
        for runner in runners[1:]:
            runner.forward()
    except Unavailable as reason:
        return {"missing": str(reason)}, []
    except Exception as failure:  # a competitor's code may raise anything
        if ours:
            raise
        lines = str(failure).splitlines() or [""]
        return {"missing": f"{type(failure).__name__}: {lines[0][:200]}"}, []
    for runner in runners:
        runner.clear()
    return {"error": error}, runners


def _train(runner: Runner, grad_out: torch.Tensor, backward: bool) -> dict[str, float]:
    clock = (GpuClock if grad_out.is_cuda else Clock)()
    clock.mark()
    out = runner.forward()
    clock.mark()
    if backward:
        runner.backward(out, grad_out)
        clock.mark()
    runner.clear()
    return dict(zip(("forward", "backward"), clock.seconds(), strict=False))


def _decode(
    runners: Sequence[Runner], device: str, replay: Callable[[], None] | None
) -> dict[str, float]:
    started = now(device)
    if replay:
        replay()
    else:
        for runner in runners:
            runner.forward()
    return {"decode": (now(device) - started) / len(runners)}


def _capture(runners: Sequence[Runner]) -> Callable[[], None] | None:
    """Capture all forwards in one CUDA graph; return None if they wait for the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for runner in runners:
                runner.forward()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _memory(name: str, problem: Problem, runner: Runner) -> dict:
    """Peak and saved bytes above the inputs."""
    tensors = [t for t in problem.inputs if isinstance(t, torch.Tensor)]
    tensors += [problem.grad_out, *runner.leaves]
    saved = saved_bytes(runner.forward, tensors)
    peak = peak_bytes(
        lambda: runner.backward(runner.forward(), problem.grad_out), problem.case.device
    )
    runner.clear()
    return {"peak": peak, "saved": saved, "saved_formula": saved_formula(name, problem.case)}


def timed_training(
    records: dict[str, dict], runners: dict[str, Runner], grad_out: torch.Tensor, options: Options
) -> None:
    """Time forward and backward of warm runners, and put the seconds into their records."""
    steps = {
        name: functools.partial(_train, runner, grad_out, options.backward)
        for name, runner in runners.items()
    }
    add_seconds(records, options.measure(steps))


def add_seconds(records: dict[str, dict], samples: dict[str, dict]) -> None:
    """Put the seconds into the providers' records."""
    for name, modes in samples.items():
        records[name]["seconds"] = modes


def _record(layers: Sequence[Problem], records: dict[str, dict]) -> dict:
    """Return the record, with one layer's operations and bytes of the base's GEMMs by mode."""
    case = layers[0].case
    hit = sum(len(layer.hit_experts) for layer in layers) / len(layers)
    flops, weights = case.forward_flops, round(hit * case.expert_bytes)
    passes = {"forward": 1, "backward": 1, "both": 2, "decode": 1}
    return {
        "case": case.describe() | {"layers": len(layers)},
        "flops": {mode: count * flops for mode, count in passes.items()},
        "bytes": {mode: count * weights for mode, count in passes.items()},
        "providers": records,
    }
