"""Context managers for what holds for a while: eval mode, frozen parameters, hooks."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def ending_with(restore: Callable[[], object]) -> Iterator[None]:
    """Call ``restore`` at the end, and once more if anything is raised, within or in ``restore``.

    The second call finishes what Ctrl-C has stopped. What is restored must therefore change inside
    the context alone, and ``restore`` must be right however often it runs.
    """
    try:
        try:
            yield
        finally:
            restore()
    except BaseException:
        restore()
        raise


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and each of their modules back into the mode that it had."""
    modes = {module: module.training for model in models for module in model.modules()}

    def restore() -> None:
        for module, training in modes.items():
            module.training = training

    with ending_with(restore):
        for model in models:
            model.eval()
        yield


@contextmanager
def training_only(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Let these parameters of a model require grad and no others, and put back what did before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(trained)

    def restore() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    with ending_with(restore):
        for parameter in flags:
            parameter.requires_grad_(parameter in chosen)
        yield


@contextmanager
def removing_hooks() -> Iterator[list[RemovableHandle]]:
    """Yield a list for the handles of hooks, which are removed at the end."""
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with ending_with(remove):
        yield handles
