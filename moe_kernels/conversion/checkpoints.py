"""The file from which ``heal`` goes on: written as a whole, and checked before it is used."""

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.files import is_of_the_system, replacing

_FORMAT = 3
# Entries of a configuration that say nothing of what the model computes.
_IRRELEVANT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def describe(
    moe: PreTrainedModel, dense: PreTrainedModel, batches: Iterable[Tensor], trained: Iterable[str]
) -> dict[str, Any]:
    """Return what a run depends on beside its settings: digests of all weights, configurations."""
    named, trained = dict(moe.named_parameters()), set(trained)
    return {
        "batches": digest(enumerate(batches)),
        "initial weights": digest((n, p) for n, p in named.items() if n in trained),
        "frozen weights": digest((n, p) for n, p in named.items() if n not in trained),
        "dense model": digest(dense.state_dict().items()),
        **_configuration("moe", moe),
        **_configuration("dense", dense),
    }


def digest(named: Iterable[tuple[object, Tensor]]) -> str:
    """Return a hash of tensors with their names, dtypes, shapes and all values."""
    hashed = hashlib.sha256()
    for name, tensor in named:
        data = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        hashed.update(data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b"")
    return hashed.hexdigest()[:16]


def _configuration(kind: str, model: PreTrainedModel) -> dict[str, Any]:
    values = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {f"{kind}.{name}": each for name, each in values.items() if name not in _IRRELEVANT}


def save(file: Path, state: Mapping[str, Any]) -> None:
    """Replace ``file`` by the state as a whole; every record carries a checksum."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with replacing(file) as temporary:
            torch.save({"format": _FORMAT, **state}, temporary)
    finally:
        torch.serialization.set_crc32_options(before)


def read(file: Path) -> dict[str, Any]:
    """Return the state in a file, its tensors on the CPU.

    Raises:
        ValueError: the file is damaged, or an older version wrote it.
    """
    try:
        with zipfile.ZipFile(file) as records:
            damaged = records.testzip()  # compares the checksums, which torch.load does not
        if damaged:
            raise ValueError(f"the checksum of {damaged} differs")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise anything
        if is_of_the_system(error):
            raise
        raise _Damaged(file, str(error)) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(
            f"{file} is of another version of moe_kernels, and does not say from which weights "
            "and models it started: delete it, or pass another folder, and heal from the start"
        )
    return state


class _Damaged(ValueError):
    def __init__(self, file: Path, reason: str):
        super().__init__(
            f"{file} is damaged ({reason}): delete it, or pass another folder, and heal from the "
            "start"
        )


def check(
    file: Path,
    state: dict[str, Any],
    described: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise unless a state is that of this run, and fits parameters and optimizer as it is.

    Args:
        file: named in errors.
        state: as :func:`read` returns it.
        described: what this run depends on, with its settings.
        parameters: those that the run trains, by name.
        optimizer: of these parameters.

    Raises:
        ValueError: another run, or contents that no run writes.
    """
    try:
        difference = _difference(state, described)
        problem = None if difference else _problem(state, parameters, optimizer, described["steps"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise _Damaged(file, f"{type(error).__name__}: {error}") from error
    if difference:
        raise ValueError(
            f"{file} is the checkpoint of another run: {difference}; pass the same again, or "
            "another folder"
        )
    if problem:
        raise _Damaged(file, problem)


def _difference(state: dict[str, Any], described: dict[str, Any]) -> str | None:
    """Return in what another run differs, or None.

    The weights to train may be those that the run began with, or those of the checkpoint. An entry
    of a configuration that one of two versions of transformers lacks is no difference.
    """
    saved = dict(state["described"])
    if described["initial weights"] == digest(state["parameters"].items()):
        saved["initial weights"] = described["initial weights"]
    for name, value in described.items():
        there = saved.get(name)
        if type(there) is type(value) and there == value:
            continue
        if "." not in name or name in saved:
            return f"{name} was {there!r} there and is {value!r} now"
    return None


def _problem(
    state: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> str | None:
    """Return what in a state no run writes, or None."""
    step, report = state["step"], state["report"]
    if type(step) is not int or not 0 <= step <= steps:
        return f"step {step!r} is not one of 0..{steps}"
    if list(state["parameters"]) != list(parameters):
        return "it has other parameters than those that are trained"
    for name, parameter in parameters.items():
        if problem := _misfit(state["parameters"][name], parameter):
            return f"{name} {problem}"
    numbers = [report["seconds"], report["tokens"], *report["losses"]]
    if set(report) != {"losses", "seconds", "tokens"} or len(report["losses"]) != step:
        return f"its report is not one of {step} steps"
    if not all(type(each) in (int, float) and math.isfinite(each) for each in numbers):
        return "its report has values that are not finite numbers"
    return _optimizer_problem(state["optimizer"], optimizer, step)


def _optimizer_problem(saved: dict[str, Any], now: torch.optim.Optimizer, step: int) -> str | None:
    """Return why an optimizer's state is not of these parameters at this step, or None."""
    groups = [saved["param_groups"], now.state_dict()["param_groups"]]
    # The learning rate is set anew at every step.
    groups = [[{k: v for k, v in g.items() if k != "lr"} for g in each] for each in groups]
    if groups[0] != groups[1]:
        return "its optimizer has other settings"
    parameters = [parameter for group in now.param_groups for parameter in group["params"]]
    if set(saved["state"]) != set(range(len(parameters) if step else 0)):
        return "its optimizer has the state of other parameters"
    for number, moments in saved["state"].items():
        if set(moments) != {"step", "exp_avg", "exp_avg_sq"} or moments["step"].item() != step:
            return f"its optimizer's state {number} is not that of step {step}"
        for name in ("exp_avg", "exp_avg_sq"):
            if problem := _misfit(moments[name], parameters[number]):
                return f"its optimizer's {name} {number} {problem}"
        if (moments["exp_avg_sq"] < 0).any():
            return f"its optimizer's exp_avg_sq {number} is negative"
    return None


def _misfit(saved: Tensor, parameter: Tensor) -> str | None:
    found = saved.dtype, tuple(saved.shape)
    if found != (expected := (parameter.dtype, tuple(parameter.shape))):
        return f"is {found[0]} {found[1]}, not {expected[0]} {expected[1]}"
    return None if saved.isfinite().all() else "is not finite"
