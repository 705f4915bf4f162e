"""Files of an adapter: ``adapter_model.safetensors`` beside ``adapter_config.json``.

The configuration is in the safetensors header too, so the weights alone say which model they fit.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
LAYOUT = 1  # raised when names or shapes of the saved tensors change


def write(folder: Path, tensors: dict[str, Tensor], text: str, metadata: dict[str, str]) -> None:
    """Write the two files; each replaces an old one only when both are complete.

    The weights are replaced first. Our own weights carry the configuration that is read back, so
    an interruption between the two leaves a good adapter beside an older JSON, which only people
    read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    weights, settings = folder / f".{WEIGHTS_NAME}.tmp", folder / f".{CONFIG_NAME}.tmp"
    try:
        save_file(tensors, weights, metadata=metadata)
        settings.write_text(text)
        os.replace(weights, folder / WEIGHTS_NAME)
        os.replace(settings, folder / CONFIG_NAME)
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)


def read_config(folder: Path) -> dict:
    """Return the header of the adapter's weights: its configuration and the model it fits.

    Raises:
        FileNotFoundError: the folder has no adapter.
        ValueError: the file is damaged, not ours, or of another layout.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: {WEIGHTS_NAME} is missing")
    with opened(path) as file:
        text = (file.metadata() or {}).get("adapter_config")
    try:
        saved = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its header is not JSON: {error}") from error
    if missing := {"layout", "lora", "added_tokens", "base_model", "versions"} - set(saved):
        raise ValueError(
            f"{path} was not written by moe_kernels: its header lacks {', '.join(sorted(missing))}"
        )
    if saved["layout"] != LAYOUT:
        raise ValueError(
            f"the adapter has layout {saved['layout']} (moe_kernels "
            f"{saved['versions']['moe_kernels']}), this version reads layout {LAYOUT}"
        )
    return saved


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Load all tensors, so that a damaged file is found before any of them is used."""
    with opened(folder / WEIGHTS_NAME) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file; raise a ValueError with its path if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
