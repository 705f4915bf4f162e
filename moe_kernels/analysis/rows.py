"""Hooks that observe a model's forwards: the modality of each row, and the routers' choices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_kernels import arguments
from moe_kernels.models.context import PerThread, resolve_modality_ids
from moe_kernels.models.handle import PatchState, get_patched, is_patched
from moe_kernels.models.padding import cache_of
from moe_kernels.models.parts import MoeBlock
from moe_kernels.modes import ending_with, removing_hooks


def modality_by_token_id(token_ids: Mapping[str, range]) -> Callable[[Tensor], Tensor]:
    """Return a function from token ids to modality ids, for tensors of any shape.

    Ids in the m-th range (counted from 1) map to m, all others to 0, the base modality.

    Raises:
        TypeError: a value is no range.
    """

    if not all(isinstance(ids, range) for ids in token_ids.values()):
        raise TypeError(f"token_ids must map names to ranges of ids; got {dict(token_ids)!r}")

    def modality_of(input_ids: Tensor) -> Tensor:
        modality = torch.zeros_like(input_ids)
        for number, ids in enumerate(token_ids.values(), start=1):
            modality = modality.masked_fill(
                (input_ids >= ids.start) & (input_ids < ids.stop), number
            )
        return modality

    return modality_of


class RowModality(PerThread):
    """The modality of every row of the forward that is running, kept up to date by model hooks.

    Each thread has a forward of its own.

    It comes from the first of these that is available: ``observed``, which serves one forward; the
    ``modality_ids`` argument of the call; ``modality_of(input_ids)``; a patched model's ranges
    of token ids; the base modality, if the model is not patched. Padding, given as -1 or marked by
    the attention mask, is -1.

    Attributes:
        names: names of the modalities, the base modality first.
    """

    def __init__(
        self,
        model: nn.Module,
        modality_of: Callable[[Tensor], Tensor] | None = None,
        names: Sequence[str] | None = None,
    ):
        if isinstance(model, PatchState):
            raise TypeError("this is the handle of a patched model: pass its model, handle.model")
        if isinstance(names, str):
            raise TypeError(f"modalities must be a list of names; got the string {names!r}")
        # The patched model may be inside a wrapper (DDP), which passes its inputs on.
        patched = [module for module in model.modules() if is_patched(module)]
        self.model, self.is_patched = (patched or [model])[0], bool(patched)
        self.modality_of = modality_of
        if names is None:
            added = get_patched(self.model).config.modalities if patched else ()
            names = ("text", *(added or (() if modality_of is None else ("image",))))
        super().__init__()
        self.names = tuple(names)

    @property
    def current(self) -> Tensor | None:
        """(B * S,) int64 of the forward that runs in this thread, or None."""
        return getattr(self._local, "current", None)

    @property
    def observed(self) -> Tensor | None:
        """(B, S) or (B * S,) int64 for this thread's next forward, or None."""
        return getattr(self._local, "observed", None)

    @observed.setter
    def observed(self, modality_ids: Tensor | None) -> None:
        self._local.observed = modality_ids

    @property
    def adapters_enabled(self) -> bool:
        """True if the model is patched and its forwards currently add low-rank updates."""
        return self.is_patched and get_patched(self.model).adapters_enabled

    def number(self, name: str) -> int:
        """Return the modality id of a name.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in self.names:
            raise ValueError(
                f"unknown modality {name!r}; the modalities are {', '.join(self.names)}"
            )
        return self.names.index(name)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Set ``current`` during the model's forwards while open."""
        model, before, after = self.model, self._before_forward, self._after_forward
        with removing_hooks() as handles, ending_with(after):
            handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(model.register_forward_hook(after, always_call=True))
            yield

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if _recomputes():
            return
        call = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        input_ids, inputs_embeds = call.get("input_ids"), call.get("inputs_embeds")
        modality_ids = self.observed if self.observed is not None else call.get("modality_ids")
        self.observed = None
        if modality_ids is None and input_ids is not None:
            if self.modality_of is not None:
                modality_ids = self.modality_of(input_ids)
            elif not self.is_patched:
                modality_ids = torch.zeros_like(input_ids)
        if modality_ids is None and not (self.is_patched and input_ids is not None):
            raise ValueError(
                "the modality of these rows is unknown: without input_ids, pass modality_ids to "
                "the model (or to RoutingRecorder.observe)"
            )
        arguments.tensors("(B, S) of integers", input_ids=input_ids, modality_ids=modality_ids)
        if modality_ids is not None and modality_ids.ndim == 1:
            shape = inputs_embeds.shape[:2] if input_ids is None else input_ids.shape
            if modality_ids.numel() == shape.numel():
                modality_ids = modality_ids.view(shape)
        self._local.current = resolve_modality_ids(
            get_patched(module).modality_of if self.is_patched else torch.zeros_like,
            modality_ids,
            num_modalities=len(self.names) - 1,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=call.get("attention_mask"),
            cache=cache_of(call),
        ).reshape(-1)

    def _after_forward(self, *_) -> None:
        # A router called on its own, outside a forward, must not reuse the last forward's modality.
        self._local.current = self._local.observed = None


def _recomputes() -> bool:
    """Return whether this thread is in a backward pass, where checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1


class RouterHook:
    """Forward hook on a router that calls ``add(layer, inputs, logits, indices)``, a row per token.

    A callable object instead of a closure, so that a deepcopy of the model gets hooks of its own.
    """

    def __init__(
        self,
        layer: str,
        row_modality: RowModality,
        add: Callable[[str, Tensor, Tensor, Tensor], None],
    ):
        self.layer, self.row_modality, self.add = layer, row_modality, add

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> None:
        if _recomputes():
            return
        if not (
            isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point()
        ):
            raise TypeError(
                f"{self.layer} ({type(module).__name__}) does not return (logits, scores, indices)"
            )
        tensors = (args[0], output[0], output[2])
        inputs, logits, indices = (t.detach().reshape(-1, t.shape[-1]) for t in tensors)
        current = self.row_modality.current
        num_known = 0 if current is None else len(current)
        if num_known != len(logits):
            raise RuntimeError(
                f"{self.layer} routes {len(logits)} rows, but the modality of {num_known} rows is "
                "known"
            )
        self.add(self.layer, inputs, logits, indices)


@contextmanager
def watch_routers(
    blocks: Mapping[str, MoeBlock],
    row_modality: RowModality,
    add: Callable[[str, Tensor, Tensor, Tensor], None],
) -> Iterator[None]:
    """Call ``add(layer, inputs, logits, indices)`` after each router's forward while open.

    Forwards within a backward pass are left out: activation checkpointing runs them a second time.

    inputs: (T, H); logits: (T, E); indices: (T, K). Row t has modality ``row_modality.current[t]``.
    """
    with row_modality.hooks(), removing_hooks() as handles:
        for name, block in blocks.items():
            hook = RouterHook(name, row_modality, add)
            handles.append(block.router.register_forward_hook(hook))
        yield
