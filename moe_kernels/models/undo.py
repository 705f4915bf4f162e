"""Changes to a model that happen wholly or not at all."""

import itertools
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_kernels.models.handle import HANDLE


@contextmanager
def all_or_nothing(
    model: nn.Module, *others: object, values: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Put a model back as it was if anything is raised within, Ctrl-C included.

    Put back are submodules, parameters, buffers, hooks, all other attributes, what requires grad,
    the settings of its configurations and its handle. Values of tensors stay as they are, except
    those of ``values``. A ``return`` belongs inside, so that an interrupt there is not too late.

    Args:
        model: the model.
        *others: objects whose attributes are put back too; None is left out.
        values: tensors whose values are put back. They are copied first.
    """
    before = _Before(model, others, values)
    try:
        try:
            yield
        except BaseException:
            before.restore()
            raise
    except BaseException:
        before.restore()  # once more, for the interrupt that comes during the first
        raise


class _Before:
    """State of a model, to be restored: which objects hang where, not what tensors hold."""

    def __init__(self, model: nn.Module, others: Iterable[object], values: Iterable[Tensor]):
        objects = [*model.modules(), *_settings(model), *(o for o in others if o is not None)]
        attributes = list(map(vars, objects))
        # One level down: a module's hooks, parameters and submodules are in dicts of their own.
        inside = list(itertools.chain(*map(dict.values, attributes)))
        self.containers = []
        for kind in (dict, list, set):
            found = [value for value in (*attributes, *inside) if isinstance(value, kind)]
            self.containers += zip(found, map(kind, found), strict=True)
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.values = [(tensor, tensor.detach().clone()) for tensor in values]

    @torch.no_grad()
    def restore(self) -> None:
        for container, before in self.containers:
            if not _same(container, before):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(before)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        for tensor, before in self.values:
            tensor.copy_(before)


def _settings(model: nn.Module) -> list[object]:
    """Return the configurations of a model, and its handle if it is patched."""
    names = ("config", "generation_config", HANDLE)
    found = [vars(module).get(name) for module in model.modules() for name in names]
    return list({id(each): each for each in found if each is not None}.values())


def _same(container: dict | list | set, before: dict | list | set) -> bool:
    """Return whether a container holds the very same objects in the same order."""
    if isinstance(container, dict):
        return _same(list(container), list(before)) and _same(
            list(container.values()), list(before.values())
        )
    return len(container) == len(before) and all(map(operator.is_, container, before))
