"""Files of an adapter: ``modality_adapter.safetensors``, beside ``modality_adapter_config.json``.

The weights alone say which model they fit: see :mod:`moe_kernels.tensor_files`.
"""

import contextlib
from pathlib import Path

from moe_kernels import schema, tensor_files
from moe_kernels.models import schemas
from moe_kernels.tensor_files import TensorFile

_OF_PEFT = ("adapter_model.safetensors", "adapter_config.json")
_MARKS = ("layout", "lora", "base_model")
PEFT_NAMES = tensor_files.Names(*_OF_PEFT, marks=("peft_type",), shared=True)
NAMES = tensor_files.Names(
    "modality_adapter.safetensors",
    "modality_adapter_config.json",
    marks=_MARKS,
    earlier=tensor_files.Names(*_OF_PEFT, marks=_MARKS),
)
LAYOUT = 1  # raised when names or shapes of the saved tensors change


def opened(folder: Path) -> contextlib.AbstractContextManager[TensorFile]:
    """Open the weights in a folder; see :func:`moe_kernels.tensor_files.opened`."""
    return tensor_files.opened(folder, NAMES, "adapter")


def check_not_earlier(folder: Path) -> None:
    """Raise ValueError if files of PEFT would replace an adapter of ours under earlier names."""
    if tensor_files.owned(folder, NAMES.earlier):
        raise ValueError(
            f"{folder} has an adapter of moe_kernels under the names of an earlier version, which "
            "are PEFT's, and it would be replaced: load it and save it by save_adapter, which "
            "gives its files other names, or save that of PEFT into another folder"
        )


def read_config(file: TensorFile) -> dict:
    """Return the header of the weights: the adapter's configuration and the model it fits.

    Raises:
        ValueError: the header is damaged, not ours, of another layout, or a field has another type.
    """
    saved = file.config() or {}
    if missing := {"layout", "lora", "added_tokens", "base_model", "versions"} - set(saved):
        raise ValueError(
            f"{file.path} was not written by moe_kernels: its header lacks "
            f"{', '.join(sorted(missing))}"
        )
    for field in ("layout", "versions"):
        schema.check({field: saved[field]}, {field: schemas.ADAPTER[field]}, file.path)
    if saved["layout"] != LAYOUT:
        raise ValueError(
            f"the adapter has layout {saved['layout']} (moe_kernels "
            f"{saved['versions']['moe_kernels']}), this version reads layout {LAYOUT}"
        )
    schema.check(saved, schemas.ADAPTER, file.path)
    return saved
