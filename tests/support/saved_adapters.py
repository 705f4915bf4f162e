"""Read adapters and image tokenizers on disk, and rewrite them with changes."""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ADAPTER = ("modality_adapter.safetensors", "modality_adapter_config.json")
PEFT = EARLIER_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
TOKENIZER = ("image_tokenizer.safetensors", "image_tokenizer_config.json")
EARLIER_TOKENIZER = ("codebook.safetensors", "tokenizer_config.json")
WEIGHTS, CONFIG = ADAPTER
# Contents of files that have one of our names and are not ours; None: a folder.
STRANGERS = (
    b'{"layout": "NCHW", "image_shape": [3, 224, 224]}', b"no JSON", b"[]", b"", None, {"w": 2.0},
)  # fmt: skip
SAYS_WHOSE = "is (a folder|damaged, or a file of something else), and would be replaced: move it"


def read(folder, names=ADAPTER):
    """Return the configuration in the header of a file, and the file's tensors by name."""
    path, key = folder / names[0], names[1].removesuffix(".json")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key]), load_file(path)


@contextlib.contextmanager
def strange(folder, name, content):
    """Put a stranger's file into a folder; at the end it must be there as it was, and alone."""
    path = folder / name
    if content is None:
        path.mkdir()
    elif isinstance(content, dict):
        save_file({key: torch.tensor(value) for key, value in content.items()}, path)
    else:
        path.write_bytes(content)
    before = None if content is None else path.read_bytes()
    yield
    assert list(folder.rglob("*")) == [path]
    assert content is None or path.read_bytes() == before


def rewrite(folder, change_header=None, change_tensors=None, names=ADAPTER):
    """Rewrite both files with a changed header or changed tensors, without a checksum."""
    header, tensors = read(folder, names)
    for change, what in ((change_header, header), (change_tensors, tensors)):
        if change:
            change(what)
    text = json.dumps(header)
    metadata = {"format": "pt", names[1].removesuffix(".json"): text}
    save_file(tensors, folder / names[0], metadata=metadata)
    (folder / names[1]).write_text(text)


def give_earlier_names(folder, names, earlier):
    """Rename both files, and the configuration in the header, as older versions called them."""
    header, tensors = read(folder, names)
    for name in names:
        (folder / name).unlink()
    text = json.dumps(header)
    save_file(tensors, folder / earlier[0], metadata={earlier[1].removesuffix(".json"): text})
    (folder / earlier[1]).write_text(text)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every field in a value of JSON."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


def replaced(header: dict, path: tuple, value: Any) -> dict:
    """Return a copy of a header with another value at a path."""
    changed = inner = copy.deepcopy(header)
    *above, last = path
    for key in above:
        inner = inner[key]
    inner[last] = value
    return changed
