"""Adapters on disk that are made of others: averaged, scaled, interpolated, or added exactly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moe_kernels import tensor_files
from moe_kernels.models import adapter_files
from moe_kernels.models.adapter_files import NAMES
from moe_kernels.models.projections import LORA

Method = Literal["concatenate", "average"]


def combine_adapters(
    adapters: Mapping[str | Path, float], folder: str | Path, *, method: Method = "concatenate"
) -> None:
    """Write an adapter that is made of others, which ``save_adapter`` has written.

    With A_i (r_i, in) and B_i (out, r_i) of an adapter, its update is s_i B_i A_i, where s_i is its
    ``lora_alpha / r_i``. The weights are w_i.

    - "concatenate" gives the update sum_i w_i s_i B_i A_i exactly, at the rank sum_i r_i. Of one
      adapter alone it is the same adapter, scaled.
    - "average" gives A = sum_i w_i A_i and B = sum_i w_i B_i at the rank that all have, as averaged
      checkpoints of one run do. Its update is not the average of the updates. The weights add up
      to 1; two of them, 1 - t and t, interpolate.

    Either way the added rows are averaged by the weights, which are divided by their sum. What is
    frozen in all adapters is frozen in theirs.

    Args:
        adapters: weight of each adapter, by its folder.
        folder: to write to, as ``save_adapter`` does.
        method: "concatenate" or "average".

    Raises:
        FileNotFoundError: a folder has no adapter.
        ValueError: the adapters are of different bases, shapes or added tokens, have added experts
            or projectors, or ranks by pattern; or the weights do not fit the method. Nothing has
            been written then.

    Example:
        >>> combine_adapters({"sketches": 0.5, "photos": 0.5}, "both")
    """
    weights = list(adapters.values())
    read = [_read(Path(each)) for each in adapters]
    headers, tensors = [header for header, _ in read], [each for _, each in read]
    _check_weights(weights, method, rows=any(header["added_tokens"] for header in headers))
    _check_alike([str(each) for each in adapters], headers, tensors, method)
    # Of old files without the field nothing is known, and all of the new adapter trains.
    frozen = set.intersection(*(set(each.get("frozen", ())) for each in headers))
    header = headers[0] | {"frozen": sorted(frozen)}
    if method == "concatenate":
        rank = sum(each["lora"]["r"] for each in headers)
        scaling = _scaling(headers[0])
        header["lora"] = headers[0]["lora"] | {"r": rank, "lora_alpha": scaling * rank}
        factors = [w * _scaling(h) / scaling for w, h in zip(weights, headers, strict=True)]
    else:
        factors = weights
    combined = {
        name: _combine(name, [each[name] for each in tensors], weights, factors, method)
        for name in tensors[0]
    }
    tensor_files.check_finite(combined, Path(folder))
    tensor_files.write(Path(folder), NAMES, combined, header)


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    with adapter_files.opened(folder) as file:
        return adapter_files.read_config(file), dict(file.read())


def _scaling(header: dict) -> float:
    return header["lora"]["lora_alpha"] / header["lora"]["r"]


def _combine(
    name: str, values: list[Tensor], weights: list[float], factors: list[float], method: Method
) -> Tensor:
    """Return a tensor of the new adapter; ``factors`` are those of B."""
    if f".{LORA}." not in name:
        total = sum(weights)
        return _weighted(values, [weight / total for weight in weights])
    if method == "average":
        return _weighted(values, weights)
    if name.endswith("lora_A"):
        return torch.cat(values, dim=-2)
    scaled = [factor * value for factor, value in zip(factors, values, strict=True)]
    return torch.cat(scaled, dim=-1)


def _weighted(values: list[Tensor], weights: list[float]) -> Tensor:
    summed = sum(weight * value.double() for weight, value in zip(weights, values, strict=True))
    return summed.to(values[0].dtype)


def _check_weights(weights: list[float], method: str, rows: bool) -> None:
    if method not in ("concatenate", "average"):
        raise ValueError(f'method must be "concatenate" or "average", got {method!r}')
    if not weights:
        raise ValueError("no adapters are given")
    if not torch.tensor(weights, dtype=torch.float64).isfinite().all():
        raise ValueError(f"weights must be finite, got {weights}")
    total = sum(weights)
    if method == "average" and abs(total - 1) > 1e-6:
        raise ValueError(f"weights of an average must add up to 1, and {weights} do to {total}")
    if total == 0 and rows:
        raise ValueError(f"weights {weights} add up to 0, and added rows are averaged by them")


def _check_alike(
    names: list[str], headers: list[dict], tensors: list[dict[str, Tensor]], method: Method
) -> None:
    """Raise ValueError unless all adapters are of one base, of one kind, and of shapes that fit."""
    for name, header in zip(names, headers, strict=True):
        for field in ("extensions", "projectors"):
            if header.get(field):
                raise ValueError(f"{name} has {field}, which cannot be combined")
        patterns = [key for key in ("rank_pattern", "alpha_pattern") if header["lora"].get(key)]
        if patterns and method == "concatenate":
            raise ValueError(f"{name} has {patterns[0]}: ranks that differ cannot be concatenated")
        if method == "concatenate" and not header["lora"]["lora_alpha"]:
            raise ValueError(f"{name} has lora_alpha 0, and so no update")
    first = _facts(headers[0], tensors[0], method)
    for name, header, values in zip(names, headers, tensors, strict=True):
        for what, value in _facts(header, values, method).items():
            if value != first[what]:
                raise ValueError(f"{names[0]} and {name} have another {what}")


def _facts(header: dict, tensors: dict[str, Tensor], method: Method) -> dict[str, object]:
    """Return what adapters must have alike."""
    free = ("r", "lora_alpha") if method == "concatenate" else ()
    return {
        "base": header["base_model"]["fingerprint"],
        "number of added tokens": list(header["added_tokens"].items()),
        "configuration": {k: v for k, v in header["lora"].items() if k not in free},
        "set of tensors": sorted(tensors),
    }
