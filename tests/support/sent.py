"""Count what a training step sends, in collectives of torch.distributed."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from support.model_zoo import VOCAB, make_model, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

IMAGE = 7  # not even: padded where the first dimension is sharded
# op -> kind, and whether the whole tensor is its first argument or its second
_KINDS = {
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
}


class Sent(TorchDispatchMode):
    """Keep kind and bytes of each collective of floating-point values within the block.

    Others are counters and checks of the engines.
    """

    def __init__(self):
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind, place = _KINDS[function.overloadpacket.__name__]
            tensors = [each for each in tree_leaves(args[place]) if isinstance(each, Tensor)]
            self.messages.append((kind, sum(each.nbytes for each in tensors)))
        elif function.namespace == "_c10d_functional":
            self._functional(function.overloadpacket.__name__, *args)
        return function(*args, **kwargs or {})

    def _functional(self, name: str, values: Tensor, *args: object) -> None:
        """Keep a collective of DTensor, which autograd knows."""
        kinds = {"all_gather_into_tensor": "all-gather", "reduce_scatter_tensor": "reduce-scatter"}
        if name in kinds:
            ranks = args[0] if name.startswith("all_gather") else 1
            self.messages.append((kinds[name], values.nbytes * ranks))

    def bytes(self) -> dict[str, int]:
        """Return the bytes of all messages of each kind."""
        kinds = sorted({kind for kind, _ in self.messages})
        return {k: sum(size for kind, size in self.messages if kind == k) for k in kinds}


@functools.cache
def formulas() -> ModuleType:
    """Return benchmarks/lib/collectives.py; nothing else that is imported knows of its folder."""
    path = Path(__file__).parents[2] / "benchmarks" / "lib" / "collectives.py"
    spec = importlib.util.spec_from_file_location("_collectives", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def base(**settings) -> nn.Module:
    return make_model("mixtral", dtype=torch.bfloat16, **settings)


def patched(model: nn.Module) -> nn.Module:
    patch_model(model, ModalityLoraConfig(r=2, target_modules=("experts", "attention")))
    add_modality_tokens(model, "image", IMAGE)
    return model.train()


def step(model: nn.Module, backward: Callable[[Tensor], object] = Tensor.backward) -> Sent:
    """Return what a step of training sends, once the engine has seen others."""
    ids = token_ids(2, 12)
    ids[:, 6:] = VOCAB + ids[:, 6:] % IMAGE
    for _ in range(3):
        with Sent() as sent:
            backward(model(input_ids=ids, labels=ids).loss)
    return sent
