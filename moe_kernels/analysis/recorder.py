"""A recorder that counts the experts chosen for rows of each modality while a model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import arguments
from moe_kernels.analysis.rows import RowModality, watch_routers
from moe_kernels.analysis.statistics import RoutingStatistics
from moe_kernels.models.parts import find_moe_blocks


class _Sums(NamedTuple):
    """Sums of a layer over forwards."""

    counts: Tensor  # (M, E)
    rows: Tensor  # (M,)
    entropy: Tensor  # (M,)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*map(torch.add, self, other))


class RoutingRecorder:
    """Context manager that sums the choices of every router of ``model``, in constant memory.

    The modality of a forward's rows comes from the first of these that is available:

    1. the ids passed to ``observe`` before this forward;
    2. the ``modality_ids`` argument of the call;
    3. ``modality_of(input_ids)``;
    4. the token ids, in a model that :func:`moe_kernels.patch_model` has patched;
    5. the base modality, in any other model.

    Padding (-1, or what the ``attention_mask`` leaves out) is not counted. The routers are the
    ``gate`` or ``router`` of every module that has ``experts``; their forward must return (logits,
    scores, indices) with one row per token. A forward within a backward pass is not counted, since
    activation checkpointing runs it for the second time then. Several threads may run the model.
    Nothing synchronises with a GPU. Modality ids are checked on the CPU, and on a GPU only with
    ``MOE_KERNELS_CHECK=1``; unchecked ids that have no name are not counted.

    Args:
        model: any Mixture of Experts of transformers, patched or not, wrapped (DDP) or not.
        modality_of: (B, S) token ids -> (B, S) modality ids; see :func:`modality_by_token_id`.
        modalities: names of the modalities, the base modality first. Default: "text", followed by
            the modalities of a patched model, or by "image" if ``modality_of`` is passed.

    Raises:
        ValueError: the model has no router. In a forward: the modality of the rows is unknown, its
            shape differs from that of the tokens, or an id has no name.

    Example:
        >>> import torch
        >>> from moe_kernels import add_modality_tokens, patch_model
        >>> from moe_kernels.analysis import RoutingRecorder
        >>> from moe_kernels.testing import tiny_model
        >>> model = tiny_model()
        >>> patched = patch_model(model)
        >>> ids = add_modality_tokens(model, "image", 10)
        >>> with torch.no_grad(), RoutingRecorder(model) as recorder:
        ...     out = model(torch.tensor([[5, 6, *ids]]))
        >>> statistics = recorder.statistics()
        >>> statistics.rows  # of text and of images, for each layer
        tensor([[ 2, 10],
                [ 2, 10]])
        >>> statistics.divergence("text", "image").shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        modality_of: Callable[[Tensor], Tensor] | None = None,
        *,
        modalities: Sequence[str] | None = None,
    ):
        self.model = model
        self._row_modality = RowModality(model, modality_of, modalities)
        self.modalities = self._row_modality.names
        self._blocks = find_moe_blocks(model)
        # By layer and thread: each thread adds to its own sums, in one assignment. A lock would
        # stay taken for ever if an interrupt came just before its release.
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._hooks: ExitStack | None = None

    def __enter__(self) -> RoutingRecorder:
        if self._hooks is not None:
            raise RuntimeError("this recorder is open already")
        hooks = ExitStack()
        try:
            hooks.callback(setattr, self, "_hooks", None)
            hooks.enter_context(watch_routers(self._blocks, self._row_modality, self._add))
            self._hooks = hooks
            return self
        except BaseException:
            hooks.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def __getstate__(self) -> dict:
        # A deepcopy of a recorded model copies its hooks, and with them a recorder that is closed.
        return self.__dict__ | {"_hooks": None}

    def observe(self, modality_ids: Tensor) -> None:
        """Set the modality ids of the next forward's rows, (B, S) or (B * S,); -1: not counted."""
        arguments.tensors("(B, S) or (B * S,) of integers", modality_ids=modality_ids)
        self._row_modality.observed = modality_ids

    def clear(self) -> None:
        """Forget all forwards so far."""
        self._sums.clear()

    def statistics(self) -> RoutingStatistics:
        """Return the sums over all forwards so far.

        Raises:
            RuntimeError: no forward ran while the recorder was open.
        """
        sums: dict[str, _Sums] = {}
        for (name, _), new in [*self._sums.items()]:
            sums[name] = sums[name] + new if name in sums else new
        if not sums:
            raise RuntimeError("nothing was recorded: no forward ran while the recorder was open")
        layers = tuple(name for name in self._blocks if name in sums)
        widths = tuple(sums[name].counts.shape[-1] for name in layers)
        shape = (len(layers), len(self.modalities), max(widths))
        counts = torch.zeros(shape, dtype=torch.int64, device="cpu")
        for layer, (name, width) in enumerate(zip(layers, widths, strict=True)):
            counts[layer, :, :width] = sums[name].counts.cpu()
        rows = torch.stack([sums[name].rows.cpu() for name in layers])
        entropy = torch.stack([sums[name].entropy.cpu() for name in layers])
        return RoutingStatistics(self.modalities, layers, counts, rows, entropy, widths)

    @torch.no_grad()
    def _add(self, layer: str, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        """Add the choices of one forward. inputs: (T, H); logits: (T, E); indices: (T, K)."""
        modalities, experts, device = len(self.modalities), logits.shape[-1], logits.device
        modality = self._row_modality.current.to(device, non_blocking=True)
        # Padding goes to an extra bin behind the last modality, which is dropped. Boolean indexing
        # and bincount would be simpler, but both wait for the device.
        bins = torch.where((modality < 0) | (modality >= modalities), modalities, modality)
        cells = (bins.unsqueeze(1) * experts + indices).flatten()
        sums = torch.zeros((modalities + 1) * experts, dtype=torch.int64, device=device)
        sums.scatter_add_(0, cells, torch.ones_like(cells))
        counts = sums[: modalities * experts].view(modalities, experts)
        members = bins == torch.arange(modalities, device=device).unsqueeze(1)  # (M, T)
        # A router may exclude an expert by a logit of -inf: entr(0) is 0, but 0 * log(0) is NaN.
        entropy = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        entropy_sum = torch.where(members, entropy, 0.0).sum(1)
        place = layer, threading.get_ident()
        new = _Sums(counts, members.sum(1), entropy_sum)
        self._sums[place] = self._sums[place] + new if place in self._sums else new
