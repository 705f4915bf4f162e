"""Files of an adapter: ``adapter_model.safetensors`` beside ``adapter_config.json``.

The weights alone say which model they fit: see :mod:`moe_kernels.tensor_files`.
"""

import contextlib
from pathlib import Path

from moe_kernels import schema, tensor_files
from moe_kernels.models import schemas
from moe_kernels.tensor_files import TensorFile

NAMES = tensor_files.Names("adapter_model.safetensors", "adapter_config.json", mark="layout")
OURS, PEFT = "moe_kernels", "PEFT"  # who wrote an adapter: their files have the same names
LAYOUT = 1  # raised when names or shapes of the saved tensors change


def opened(folder: Path) -> contextlib.AbstractContextManager[TensorFile]:
    """Open the weights in a folder; see :func:`moe_kernels.tensor_files.opened`."""
    return tensor_files.opened(folder, NAMES, "adapter")


def check_library(folder: Path, library: str) -> None:
    """Raise ValueError if a folder has an adapter of the other library, which would be replaced.

    Args:
        folder: that ``library`` is to write into.
        library: :data:`OURS` or :data:`PEFT`.
    """
    path = folder / NAMES.config
    try:
        saved = tensor_files.parse_json(path.read_bytes(), path)
    except (OSError, ValueError):
        return
    found = PEFT if "peft_type" in saved else OURS if "layout" in saved else library
    if found != library:
        raise ValueError(
            f"{folder} has an adapter of {found}, whose files have the same names and would be "
            f"replaced: save that of {library} into another folder, such as one within"
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
