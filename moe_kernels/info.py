"""``moe-kernels info``: versions, build, backends and devices, to paste into a report."""

import argparse
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence

import torch

from moe_kernels import _native, backends, env

_DISTRIBUTIONS = {
    "moe_kernels": "modality-moe-kernels",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "peft": "peft",
    "POT": "POT",
}

_VECTORS = "bfloat16 and float16 in sizes that 8 divides, else Triton"
_LOW_RANK = ", but Triton on sm_10x, and on sm_90 without MOE_KERNELS_ENGINE=1"
_PRODUCTS = f" on sm_90 with MOE_KERNELS_ENGINE=1, off until run on a GPU, for {_VECTORS}"
_PAIRS = " up to 2,399 pairs of an expert and a modality, else Triton"
# Part of a layer -> the native op that computes it under backend "cuda", and its conditions.
_CUDA_OPS = {
    "dispatch": ("dispatch", _PAIRS),
    "tile maps": ("tile_maps", _PAIRS),
    "x A^T and dy B": ("shrink", _LOW_RANK),
    "dA, dB and added experts' dW": ("wgrad", _LOW_RANK),
    "gate and up, with SwiGLU": ("gate_up", _PRODUCTS),
    "down, and d(hidden_states)": ("grouped_gemm", _PRODUCTS),
    "d(pre-activation)": ("act_backward", _PRODUCTS),
    "a layer of up to 16 tokens, where nothing trains": (
        "moe_mlp_inference",
        f", in two kernels, for {_VECTORS}, with MOE_KERNELS_DECODE=1: off until run on a GPU",
    ),
    "a layer's forward, and its backward": (
        "moe_mlp_forward",
        f", one call each{_PRODUCTS}, and{_PAIRS}",
    ),
    "combine": ("combine", " for rows of whole 16 bytes, else Triton"),
    "lora_linear's u B^T": ("add_low_rank", f" for {_VECTORS}"),
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    names = [f"cpu: {platform.processor() or platform.machine()}"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return names


def _build() -> dict:
    """Return facts about the extension, or why there is none."""
    facts = _native.build_info()
    if not facts:
        return {"extension": _native.why_not()}
    if not _native.compiles_cuda_kernels():
        return facts
    folder = env.cache_path() / "kernels"
    return facts | {"cuda kernels": f"compiled by NVRTC at their first use, kept in {folder}"}


def _tiles() -> str:
    """Say where Triton's tiles come from: with others a layer has other last bits."""
    path = env.tiles_path()
    if not path.is_file():
        return "built in"
    return f"{path}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _cuda_ops() -> dict[str, str]:
    """Map each part of a layer to the kernels that the backend "cuda" runs for it."""
    return {
        name: f"CUDA{where}" if _native.has_cuda_kernel(op) else "Triton"
        for name, (op, where) in _CUDA_OPS.items()
    }


def collect() -> dict:
    """Collect everything that the command prints, as plain data."""
    versions = {name: _version(distribution) for name, distribution in _DISTRIBUTIONS.items()}
    return {
        "versions": {"python": platform.python_version(), "torch CUDA": torch.version.cuda}
        | versions,
        "build": _build(),
        "backends": {name: reason or "ok" for name, reason in backends.available().items()},
        "backend cuda": _cuda_ops() if _native.why_no_cuda() is None else {},
        "triton tiles": _tiles(),
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }


def _lines(data: Mapping) -> list[str]:
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            lines.append(f"{key}:")
            lines += [f"  {line}" for line in _lines(value)]
        elif isinstance(value, list):
            lines.append(f"{key}: {', '.join(value) or 'none'}")
        else:
            lines.append(f"{key}: {'none' if value in (None, '', {}) else value}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print what :func:`collect` found, or what a model gets, as text or as JSON."""
    parser = argparse.ArgumentParser(prog="moe-kernels info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="say instead what patch_model gives the model of this config.json, why not, and the "
        "memory to train it",
    )
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        data = collect()
    else:
        from moe_kernels.models import support  # imports transformers

        try:
            data = support.of_folder(arguments.model)
        except ValueError as error:
            parser.error(str(error))
    print(json.dumps(data, indent=2) if arguments.json else "\n".join(_lines(data)))


if __name__ == "__main__":
    main()
