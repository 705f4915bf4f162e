"""The sections of a run on a CPU: each yields one job for every case."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from lib.cases import ADDED_SHARE, DECODE_TOKENS, DTYPES, Case
from lib.cli import options_of
from lib.providers import ACCELERATED, ADDED_KINDS, HF, HF_TRAINING, PEFT, SPLIT, hf_decode
from lib.runs import Options, run_decode, run_training
from lib.steps import MODELS
from lib.steps.added_experts import run as run_added_steps
from lib.steps.training import run as run_steps
from moe_kernels import backends
from moe_kernels.testing import SHAPES

Jobs = Iterator[Callable[[], dict]]

_OVERHEAD = [(0.0, 16), (0.25, 16), (0.5, 16), (1.0, 16), (0.5, 64)]  # image share, rank
_MORE_ROUNDS = 5  # factor for cases that take milliseconds
_SLOW = {"min_rounds": 2}  # for cases that take seconds


def default_backend() -> str:
    """The backend that the package chooses on a CPU."""
    return backends.select(None, torch.device("cpu"))


def training(args: Namespace) -> Jobs:
    """Forward and backward of a layer."""
    for shape, dtype, routing in itertools.product(args.shapes, DTYPES, ("balanced", "zipf")):
        providers = training_providers(args.backend, shape, dtype, routing)
        options = options_of(
            args, thorough=_own(providers),
            memory=(f"ours:{args.backend}", SPLIT, PEFT, f"{ACCELERATED}:{args.backend}"),
            **(_SLOW if (shape, dtype) == ("olmoe", "float32") else {}),
        )  # fmt: skip
        yield partial(run_training, _case(args, shape, dtype, routing=routing), providers, options)


def training_providers(backend: str, shape: str, dtype: str, routing: str) -> list[str]:
    """Our kinds, their bound and the competitors.

    A competitor that takes many seconds a step, or that routing hardly changes, does not run in
    every case.
    """
    competitors = [*HF_TRAINING]
    if shape != "olmoe" or (routing, dtype) == ("balanced", "bfloat16"):
        competitors += [PEFT, f"{ACCELERATED}:{backend}"]
    if routing == "balanced" and (shape, dtype) != ("olmoe", "float32"):
        competitors.append(SPLIT)
    return ["bound", *_ours(backend), *competitors, *_others(backend, HF_TRAINING)]


def decode(args: Namespace) -> Jobs:
    """One call without autograd, on a few tokens."""
    for shape, dtype, tokens in itertools.product(args.shapes, DTYPES, DECODE_TOKENS):
        competitors = hf_decode(tokens)
        ours, others = _ours(args.backend), _others(args.backend, competitors)
        providers = ["read", *ours, *competitors, *others]
        options = _many_rounds(
            args, min_rounds=5, thorough=_own(providers), rotated_bytes=args.rotate_mb * 10**6
        )
        yield partial(run_decode, _case(args, shape, dtype, T=tokens), providers, options)


def overhead(args: Namespace) -> Jobs:
    """Adapters against none, by image share and rank."""
    providers = [f"{kind}:{args.backend}" for kind in ("ours", "ours_base")]
    for share, rank in _OVERHEAD:
        case = _case(args, args.shapes[0], "bfloat16", r=rank, image_share=share)
        yield partial(run_training, case, providers, _many_rounds(args))


def steps(args: Namespace) -> Jobs:
    """Training steps of whole models with adapters."""
    return _model_jobs(run_steps, args)


def added(args: Namespace) -> Jobs:
    """A layer with one added expert, which has a share of the rows."""
    providers = [f"{kind}:{args.backend}" for kinds in ADDED_KINDS.values() for kind in kinds]
    for shape, dtype in itertools.product(args.shapes, DTYPES):
        case = _case(args, shape, dtype, image_share=ADDED_SHARE * SHAPES[shape].K)
        yield partial(run_training, case, providers, options_of(args))


def added_steps(args: Namespace) -> Jobs:
    """Training steps of whole models with added experts."""
    return _model_jobs(run_added_steps, args)


SECTIONS: dict[str, Callable[[Namespace], Jobs]] = {
    "training": training,
    "decode": decode,
    "overhead": overhead,
    "steps": steps,
    "added": added,
    "added_steps": added_steps,
}


def _case(args: Namespace, shape: str, dtype: str, **settings) -> Case:
    return Case.named(shape, dtype=dtype, device=args.device, seed=args.seed, **settings)


def _many_rounds(args: Namespace, **settings) -> Options:
    options = options_of(args, **settings)
    return replace(options, rounds=_MORE_ROUNDS * options.rounds)


def _model_jobs(run: Callable[..., dict], args: Namespace) -> Jobs:
    for name in args.models:
        options = options_of(args, **(_SLOW if name == "olmoe" else {}))
        yield partial(run, MODELS[name], options, args.device, args.seed)


def _ours(backend: str) -> list[str]:
    return [f"{kind}:{backend}" for kind in ("ours", "ours_text", "ours_base")]


def _others(backend: str, competitors: Sequence[str]) -> list[str]:
    """Our other backends and transformers' other implementations.

    Most of them do not run on a CPU: their rows in the tables say why.
    """
    ours = [f"ours:{name}" for name in backends.NAMES if name not in (backend, "reference")]
    return ours + [name for name in HF if name not in (*competitors, "hf:batched_mm")]


def _own(providers: Sequence[str]) -> set[str]:
    """Ours and the bounds, which run for more rounds than the competitors."""
    return {name for name in providers if name.startswith(("bound", "read", "ours", ACCELERATED))}
