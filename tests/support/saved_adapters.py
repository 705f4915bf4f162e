"""Read adapters on disk, and rewrite them with changes."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def read(folder):
    """Return the header of an adapter's file, and its tensors by name."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["adapter_config"]), load_file(folder / WEIGHTS)


def rewrite(folder, change_header=None, change_tensors=None):
    """Rewrite an adapter's file with a changed header or changed tensors."""
    header, tensors = read(folder)
    for change, what in ((change_header, header), (change_tensors, tensors)):
        if change:
            change(what)
    save_file(tensors, folder / WEIGHTS, metadata={"adapter_config": json.dumps(header)})
