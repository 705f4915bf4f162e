"""Modality ids on their way from the model's forward to the layers.

The patched model's ``forward`` resolves (B, S) modality ids and passes them down as a keyword. A
pre-hook on each ``self_attn`` takes them: it runs before the MoE block of the same layer, and again
when activation checkpointing recomputes the layer, which a global or a hook on the layer would not.
A layer without ``self_attn`` takes them itself, and its recompute carries them.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn

from moe_kernels import arguments, backends, env
from moe_kernels.layers.modality_lora import BASE, DEFAULT, ONLY, ModalityLora
from moe_kernels.models.padding import find_real
from moe_kernels.modes import ending_with
from moe_kernels.ops import LinearDispatch, LoraWeights, checks, linear_dispatch
from moe_kernels.ops.gradients import in_graph_capture, in_transform

MISSING = (
    "this layer got no modality_ids, which the patched model's own forward derives from input_ids "
    "or takes as modality_ids=: call that, not the inner model or a layer"
)


@dataclass
class ModelCall:
    """State of one forward of a patched model.

    Attributes:
        fused_loss: what the head computes in place of logits, or None.
        head_ran: the head has run, added rows included.
        for_decoder: keywords for the text model of a multimodal model, which calls other parts
            with its own keywords too.
        chosen: the adapters of the batch.
    """

    fused_loss: Callable[..., Tensor] | None = None
    head_ran: bool = False
    for_decoder: dict[str, Any] = field(default_factory=dict)
    chosen: "Chosen | None" = None


_LEFT_OUT = (
    "what was added to {} has not been computed: a forward was replaced since patch_model (by "
    "Liger, a kernel of the hub, or by hand), or weights are used without theirs; unpatch() before "
    "such a change, and patch after it"
)


class SortedRows:
    """Rows sorted by modality, each time once for all linear modules that see the same ids.

    Ids are the same if they are one tensor, so each forward has a place of its own for them: before
    the next, or one within it, other ids may have been written into the tensor.
    """

    def __init__(self):
        self._made: list[tuple[Tensor, tuple[int, str, bool], LinearDispatch]] = []

    def of(self, modality_ids: Tensor, num_modalities: int, backend: str) -> LinearDispatch:
        """Return the rows of (B, S) ids, sorted when the first module asks.

        They are sorted anew with gradients after without: autograd cannot save tensors of
        inference mode.
        """
        key = num_modalities, backend, torch.is_grad_enabled()
        for ids, made_for, dispatched in self._made:
            if ids is modality_ids and made_for == key:
                return dispatched
        dispatched = linear_dispatch(modality_ids.reshape(-1), num_modalities, backend=backend)
        self._made.append((modality_ids, key, dispatched))
        return dispatched


class Chosen(NamedTuple):
    """Adapters of a batch, by name.

    Attributes:
        names: those that some sequence has, each once.
        of_sequence: (B,) int64, the place in ``names`` of each sequence's adapter. A sequence of
            none has the added rows of one of them, and -1 less its place. None: all sequences have
            the first.
        updates: False: no sequence gets low-rank updates.
    """

    names: tuple[str, ...] = ONLY
    of_sequence: Tensor | None = None
    updates: bool = True

    def places_of_rows(self) -> Tensor:
        """Return the place in ``names`` of the adapter whose added rows each sequence has."""
        return torch.where(self.of_sequence < 0, -1 - self.of_sequence, self.of_sequence)


@dataclass
class LayerCall:
    """State of one forward of one layer.

    Attributes:
        modality_ids: (B, S) int64; with several adapters, the m-th modality of the a-th of them is
            a M + m.
        added_experts: whether routers may choose added experts.
        adapters: names of the adapters that the ids stand for, in order.
        sorted_rows: rows sorted for adapted linear modules. All layers of a forward share them.
        pending: names of the layer's patched modules that have not run yet.
    """

    modality_ids: Tensor
    added_experts: bool = True
    adapters: tuple[str, ...] = ONLY
    sorted_rows: SortedRows = field(default_factory=SortedRows)
    pending: tuple[str, ...] = ()


class CopiedAlone:
    """An object of a patched model, which deepcopy copies and pickle refuses.

    Unpickling would have to patch a model anew: the pickle of a patched model could be written but
    not read.
    """

    def __deepcopy__(self, memo: dict) -> Self:
        copied = memo[id(self)] = object.__new__(type(self))
        for name, value in self._copied_state().items():
            copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied

    def _copied_state(self) -> dict:
        return dict(self.__dict__)

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "a patched model cannot be pickled, by torch.save(model) or for another process, nor "
            "copied in part by copy.copy: copy.deepcopy(model) copies model and handle; "
            "save_adapter(folder) writes what was added, torch.save(model.state_dict()) all "
            "tensors; another process patches the base itself and calls load_adapter(folder)"
        )


class PerThread(CopiedAlone):
    """State that each thread has for itself; a copy of the object starts without any.

    A server runs one model in several threads. What a forward needs must therefore not stand where
    the forward of another thread overwrites it. Autograd recomputes a checkpointed layer in one
    thread too, its hooks included.
    """

    def __init__(self):
        self._local = threading.local()

    def _copied_state(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __deepcopy__(self, memo: dict) -> Self:
        copied = super().__deepcopy__(memo)
        copied._local = threading.local()
        return copied


# Tensors of several adapters in one, by the projection and the adapters' names in order.
Joined = dict[tuple[ModalityLora, tuple[str, ...]], LoraWeights]


@dataclass(eq=False)
class _Held:
    """A context that leaves out a part, until it is closed, in whichever thread.

    Or one that chooses adapters; those of a batch where ``joined``, which keeps them, is not None.
    """

    switches: "Switches"
    part: str
    chosen: Chosen = Chosen()
    joined: Joined | None = None
    is_open: bool = True


# Of all models, the innermost last. A thread starts without any, a coroutine with its creator's.
_HELD: ContextVar[tuple[_Held, ...]] = ContextVar("moe_kernels_held", default=())


class Switches(PerThread):
    """Parts of a patched model that the forwards of this thread, or this coroutine, leave out.

    A generator has none of its own: what is suspended within a context leaves it open for its
    caller. Compiled models go by the thread alone.

    Attributes:
        adapters_enabled: the value for all threads, unless a thread is within
            :meth:`without_adapters`.
        added_tokens_enabled: likewise, unless a thread is within :meth:`without_added_tokens`.
        adapter: name of the adapter of all threads, unless one is within :meth:`with_adapters`.
    """

    def __init__(self):
        super().__init__()
        self.adapter = DEFAULT
        self.adapters_enabled = True
        self.added_tokens_enabled = True
        self._held_in_training = False

    @property
    def call(self) -> ModelCall | None:
        """The model's own forward that runs in this thread, or None."""
        return getattr(self._local, "call", None)

    @property
    def awaits_head(self) -> bool:
        """True while a fused head has run the inner model and not asked for the head yet."""
        return getattr(self._local, "awaits_head", False)

    @awaits_head.setter
    def awaits_head(self, awaits: bool) -> None:
        self._local.awaits_head = awaits

    @contextlib.contextmanager
    def in_forward(self, call: ModelCall) -> Iterator[None]:
        """Let this be ``call`` within."""
        before = self.call
        with ending_with(lambda: setattr(self._local, "call", before)):
            self._local.call = call
            yield

    def uses_adapters(self) -> bool:
        """Return whether forwards of this thread add low-rank updates."""
        return self.adapters_enabled and not self._held("adapters")

    def uses_added_experts(self) -> bool:
        """Return whether routers may choose added experts in forwards of this thread."""
        return not self._held("added_experts")

    def uses_added_tokens(self) -> bool:
        """Return whether the head gives logits of added tokens in forwards of this thread."""
        return self.added_tokens_enabled and not self._held("added_tokens")

    def masks_added_tokens(self) -> bool:
        """Return whether these logits are there, but are the lowest number of their dtype."""
        return self._held("unmasked_tokens")

    def chosen_outside(self) -> Chosen:
        """Return the choice of the innermost context, or the adapter of all threads."""
        return self.named(self.adapter) if (held := self._innermost()) is None else held.chosen

    def holds_adapters(self, *names: str) -> bool:
        """Return whether a context here has chosen one of these adapters; without names, any."""
        held = self._all_held("adapter")
        return any(not names or set(names) & set(each.chosen.names) for each in held)

    def joined(self) -> Joined | None:
        """Return where forwards of a batch of several adapters keep them joined, within one."""
        return None if (held := self._innermost()) is None else held.joined

    def _innermost(self) -> _Held | None:
        return held[-1] if (held := self._all_held("adapter")) else None

    def chosen(self) -> Chosen:
        """Return the adapters of the forward that runs in this thread, or of the next one."""
        call = self.call
        if call is None or call.chosen is None:
            return self.chosen_outside()
        return call.chosen

    def named(self, name: str) -> Chosen:
        """Return the choice of one adapter for all sequences, or of "base"."""
        return Chosen((self.adapter,), updates=False) if name == BASE else Chosen((name,))

    def with_adapter(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Use this adapter, or "base", within; the innermost context counts."""
        return self._without("adapter", chosen=self.named(name))

    def with_adapters_of_batch(self, chosen: Chosen) -> contextlib.AbstractContextManager[None]:
        """Use these adapters within, in forwards that say which sequence has which.

        Their values do not change within, and are joined once alone.
        """
        return self._without("adapter", chosen=chosen, joined={})

    def without_adapters(self) -> contextlib.AbstractContextManager[None]:
        """Leave out low-rank updates and modality gates within; may be nested."""
        return self._without("adapters")

    def without_added_experts(self) -> contextlib.AbstractContextManager[None]:
        """Let no router choose an added expert within; may be nested."""
        return self._without("added_experts")

    def without_added_tokens(self) -> contextlib.AbstractContextManager[None]:
        """Leave out the logits of added tokens within; may be nested."""
        return self._without("added_tokens")

    def with_masked_tokens(self) -> contextlib.AbstractContextManager[None]:
        """Mask the logits of added tokens within, before any softmax; may be nested."""
        return self._without("unmasked_tokens")

    def check_recompute(self, training: bool) -> None:
        """Raise RuntimeError if the whole model is computed again, perhaps without its contexts.

        ``torch.utils.checkpoint`` around a forward runs it again in the backward pass, where a
        context of the first time may have ended. Nothing says what it was.

        Args:
            training: whether the forward that begins now may be computed again.
        """
        if torch.compiler.is_compiling():
            return
        held = any(each.switches is self and each.is_open for each in _HELD.get())
        if torch._C._current_graph_task_id() < 0:
            self._held_in_training |= held and training
        elif held or self._held_in_training:
            raise RuntimeError(
                "checkpoint() around a forward of the whole model does not go with "
                "adapter(), adapters_disabled(), text_only() or disabled(), which its recompute "
                "does not see: checkpoint the layers (model.gradient_checkpointing_enable())"
            )

    def _held(self, part: str) -> bool:
        """Return whether a context that leaves out a part is open here."""
        return bool(self._all_held(part))

    def _all_held(self, part: str) -> list[_Held]:
        if torch.compiler.is_compiling():  # cannot trace a ContextVar
            return [each for each in self._of_thread(part) if each.is_open]
        return [
            each
            for each in _HELD.get()
            if each.switches is self and each.part == part and each.is_open
        ]

    def _of_thread(self, part: str) -> tuple[_Held, ...]:
        return getattr(self._local, part, ())

    @contextlib.contextmanager
    def _without(self, part: str, **choice: Any) -> Iterator[None]:
        held = _Held(self, part, **choice)

        def others(all_held: tuple[_Held, ...]) -> tuple[_Held, ...]:
            return tuple(each for each in all_held if each is not held)

        def close() -> None:
            held.is_open = False
            _HELD.set(others(_HELD.get()))
            setattr(self._local, part, others(self._of_thread(part)))

        with ending_with(close):
            _HELD.set((*_HELD.get(), held))
            setattr(self._local, part, (*self._of_thread(part), held))
            yield
            if held not in _HELD.get():
                raise RuntimeError(
                    "this context was entered in one thread or task and left in another, where "
                    "the forwards within it have run without it: enter it around each forward, "
                    "not around a generator that several threads continue"
                )


class ModalityContext(PerThread):
    """One layer's modality ids, shared by its experts and attention projections.

    Attributes:
        backend: passed to the ops.
        switches: those of the model.
        forwards: those of the model.
        awaited: names of the layer's modules that must run in each forward, as something was added
            to them.
    """

    def __init__(
        self,
        backend: str | None,
        switches: Switches | None = None,
        forwards: "Forwards | None" = None,
    ):
        super().__init__()
        self.backend = backend
        self.switches = switches or Switches()
        self.forwards = forwards or Forwards()
        self.awaited: tuple[str, ...] = ()

    @property
    def call(self) -> LayerCall | None:
        """All state of the forward that runs in this thread, or None."""
        return getattr(self._local, "call", None)

    @call.setter
    def call(self, call: LayerCall | None) -> None:
        self._local.call = call

    def await_module(self, name: str, awaited: bool = True) -> None:
        """Expect a module of the layer to call :meth:`module_ran` in each forward, or no longer."""
        others = tuple(each for each in self.awaited if each != name)
        self.awaited = (*others, name) if awaited else others

    def module_ran(self, name: str) -> None:
        """Note that a module of the layer has computed what was added to it."""
        if self.call is not None:
            self.call.pending = tuple(each for each in self.call.pending if each != name)

    @property
    def modality_ids(self) -> Tensor | None:
        """(B, S) int64 of the forward that runs in this thread, or None."""
        return None if self.call is None else self.call.modality_ids

    def row_ids(self) -> Tensor:
        """Return the modality ids of the forward that runs here by row, (T,) int64."""
        if self.call is None:
            raise RuntimeError(MISSING)
        return self.call.modality_ids.reshape(-1)

    @property
    def added_experts(self) -> bool:
        """Permission for routers to choose added experts in the forward that runs here."""
        return self.switches.uses_added_experts() if self.call is None else self.call.added_experts

    @contextlib.contextmanager
    def at_rows(self, modality_ids: Tensor) -> Iterator[None]:
        """Let the experts within see other rows than the layer: those that ranks sent them."""
        call, before = self.call, self.modality_ids
        with ending_with(lambda: setattr(call, "modality_ids", before)):
            call.modality_ids = modality_ids
            yield

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that the modality ids of this forward stand for."""
        return ONLY if self.call is None else self.call.adapters

    def weights(self, lora: ModalityLora) -> LoraWeights:
        """Return the low-rank pairs of this forward's adapters."""
        joined = None if torch.is_grad_enabled() else self.switches.joined()
        if joined is None or len(self.adapters) == 1:
            return lora.weights(self.adapters)
        # A forward within may name other adapters than the context: a logits processor's.
        key = lora, self.adapters
        if key not in joined:
            joined[key] = lora.weights(self.adapters)
        return joined[key]

    def start(
        self, modality_ids: Tensor, added_experts: bool = True, adapters: tuple[str, ...] = ONLY
    ) -> None:
        """Begin a forward of the layer, which shares the model's sorted rows and nothing else."""
        self.call = LayerCall(modality_ids, added_experts, adapters, self.forwards.sorted_rows)

    def finish(self) -> None:
        """End a forward: a part of the layer that is called by itself must not use its ids."""
        self.call = None

    @contextlib.contextmanager
    def running(self, modality_ids: Tensor) -> Iterator[None]:
        """Begin a forward of a part of the layer alone, and restore the call before at the end."""
        before = self.call
        with ending_with(lambda: setattr(self, "call", before)):
            switches = self.switches
            self.start(modality_ids, switches.uses_added_experts(), switches.chosen().names[:1])
            yield

    def linear_dispatch(self, num_modalities: int, weight: Tensor) -> tuple[LinearDispatch, str]:
        """Return this forward's rows sorted by modality, and the backend they are for.

        Args:
            num_modalities: M.
            weight: of the linear module; its device and dtype choose the backend.
        """
        backend = backends.select(self.backend, weight.device, weight.dtype)
        rows = self.call.sorted_rows.of(self.call.modality_ids, num_modalities, backend)
        return rows, backend


class Outer(NamedTuple):
    """State that the layers had when a forward of the model began: that of a forward around it."""

    calls: list[LayerCall | None]
    sorted_rows: SortedRows


class Forwards(PerThread):
    """Forwards of the whole model that run in this thread, one of them within another.

    A hook may call the model within its own forward. At the end of each, also by an exception, the
    layers have the calls that they had before it.

    Attributes:
        contexts: those of all layers.
    """

    def __init__(self):
        super().__init__()
        self.contexts: list[ModalityContext] = []

    def begin(self) -> Outer:
        """Return what the layers had before, for :meth:`end`."""
        if not self.running:
            self.clear()
        outer = Outer([context.call for context in self.contexts], self.sorted_rows)
        # In this order: an interrupt between the two leaves no forward that runs without rows.
        self._local.sorted_rows = SortedRows()
        self._local.running = getattr(self._local, "running", 0) + 1
        return outer

    def clear(self) -> None:
        """Take from the layers the calls that a recompute has left which failed."""
        for context in self.contexts:
            context.call = None

    def check_ended(self, outer: Outer | None = None) -> None:
        """Raise RuntimeError if the experts of a layer did not run in the forward that ends.

        Args:
            outer: what :meth:`begin` returned; default: no forward ran before.
        """
        for index, context in enumerate(self.contexts):
            if context.call is not None and context.call is not (outer and outer.calls[index]):
                raise RuntimeError(_LEFT_OUT.format(f"the experts of layer {index}"))

    @property
    def running(self) -> bool:
        """True while a forward of the patched model's own runs in this thread."""
        return getattr(self._local, "running", 0) > 0

    @property
    def sorted_rows(self) -> SortedRows:
        """Rows that the layers of the forward in this thread share; new ones outside of it.

        A layer that backward recomputes is outside, and sorts its rows itself.
        """
        return self._local.sorted_rows if self.running else SortedRows()

    def end(self, outer: Outer) -> None:
        """Give the layers what they had before this forward."""
        self._local.running -= 1
        self._local.sorted_rows = outer.sorted_rows
        for context, call in zip(self.contexts, outer.calls, strict=True):
            context.call = call


class TakeModalityIds:
    """Pre-hook of ``self_attn``: moves the model's own keywords into the layer's context.

    They are ``modality_ids`` and, where routers may choose no added expert, ``added_experts``, and
    where the adapter is another than the default one, ``adapters``.
    Checkpointing hands them to its recompute, for which a switch might have changed.

    An object, not a closure: a deepcopy of the model must set the copy's context.
    """

    def __init__(self, context: ModalityContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        if kwargs.get("modality_ids") is None:
            raise RuntimeError(MISSING)
        self.context.start(
            kwargs.pop("modality_ids"),
            kwargs.pop("added_experts", True),
            kwargs.pop("adapters", ONLY),
        )
        self.context.call.pending = self.context.awaited
        return args, kwargs


class EndForward:
    """Hook of the last part of a decoder layer, which ends the forward of its context.

    Checkpointing recomputes the parts, without a hook of the layer itself. It stops by an
    exception, after which the hook must run too. It has no output then.
    """

    def __init__(self, context: ModalityContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        call = self.context.call
        self.context.finish()
        if call is not None and call.pending and output is not None:
            raise RuntimeError(_LEFT_OUT.format(f"{', '.join(call.pending)} of a layer"))


_CHECKPOINT = "_gradient_checkpointing_func"  # transformers sets it on each layer


class TakeModalityIdsOfLayer(TakeModalityIds):
    """Pre-hook of a decoder layer without ``self_attn``, whose parts may take no keywords.

    transformers checkpoints the inside of such a layer's forward, and its recompute runs no hook of
    the layer. The function that it checkpoints by is therefore wrapped in one that carries the ids.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, kwargs = super().__call__(module, args, kwargs)
        function = module.__dict__.get(_CHECKPOINT) if _checkpoints(module) else None
        if function is not None and not isinstance(function, _CarryingCheckpoint):
            module.__dict__[_CHECKPOINT] = _CarryingCheckpoint(function, self.context)
        return args, kwargs

    @staticmethod
    def detach(layer: nn.Module) -> None:
        """Take the wrapper off a layer, if it has one."""
        function = layer.__dict__.get(_CHECKPOINT)
        if isinstance(function, _CarryingCheckpoint):
            layer.__dict__[_CHECKPOINT] = function.checkpoint


def _checkpoints(layer: nn.Module) -> bool:
    return getattr(layer, "gradient_checkpointing", False)


class _CarryingCheckpoint:
    """A checkpointing function that hands the ids of the forward to its recompute."""

    def __init__(self, checkpoint: Callable, context: ModalityContext):
        self.checkpoint, self.context = checkpoint, context

    def __call__(self, function: Callable, *args, **kwargs) -> Any:
        call = self.context.call
        self.context.finish()  # the function that is checkpointed begins the forward, and ends it
        carrying = _Carrying(
            function, self.context, call.modality_ids, call.added_experts, call.adapters
        )
        return self.checkpoint(carrying, *args, **kwargs)


@dataclass(frozen=True)
class _Carrying:
    """The inside of a decoder layer's forward, with the ids that it runs under."""

    function: Callable
    context: ModalityContext
    modality_ids: Tensor
    added_experts: bool
    adapters: tuple[str, ...]

    def __call__(self, *args) -> Any:
        output = None
        self.context.start(self.modality_ids, self.added_experts, self.adapters)
        self.context.call.pending = self.context.awaited
        try:
            output = self.function(*args)
            return output
        finally:
            EndForward(self.context)(None, (), output)


def resolve_modality_ids(
    modality_of: Callable[[Tensor], Tensor],
    modality_ids: Tensor | None,
    *,
    num_modalities: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Any,
    cache: Any = None,
) -> Tensor:
    """Return the (B, S) modality of each position: given, or by token id; -1 on padding.

    Args:
        modality_of: maps token ids to modalities.
        modality_ids: (B, S) as given by the caller, or None.
        num_modalities: M.
        input_ids: (B, S) or None.
        inputs_embeds: (B, S, H) or None.
        attention_mask: marks padding; see :func:`moe_kernels.models.padding.find_real`.
        cache: of the call.

    Raises:
        ValueError: embeddings without modality ids, ids of another shape, or (on the CPU) above M,
            or a 2-D mask with fewer than S columns.
        TypeError: modality ids that are not a tensor of integers, or token ids that are no tensor.
    """
    if input_ids is None and inputs_embeds is None:
        raise ValueError("give input_ids or inputs_embeds")
    arguments.tensors("(B, S) of integers", input_ids=input_ids, modality_ids=modality_ids)
    tokens = inputs_embeds if input_ids is None else input_ids
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (B, S), got {tuple(input_ids.shape)}")
    shape, device = tokens.shape[:2], tokens.device
    if modality_ids is None:
        if input_ids is None:
            raise ValueError(
                "inputs_embeds say nothing of the tokens' modality: give modality_ids too, (B, S) "
                "integers, 0 for the base modality, m for the m-th added one, -1 for padding"
            )
        modality_ids = modality_of(input_ids)
    elif modality_ids.is_floating_point() or modality_ids.dtype == torch.bool:
        raise TypeError(f"modality_ids must be integers, got {modality_ids.dtype}")
    elif modality_ids.shape != shape:
        raise ValueError(
            f"modality_ids must be (B, S) = {tuple(shape)}, got {tuple(modality_ids.shape)}"
        )
    elif _can_branch() and (not modality_ids.is_cuda or env.check_values()):
        checks.modality_range(modality_ids, num_modalities)
    # Contiguous, so that no layer copies them.
    modality_ids = modality_ids.to(device=device, dtype=torch.int64).contiguous()
    if (real := find_real(attention_mask, shape[1], cache)) is not None:
        modality_ids = torch.where(real.to(device), modality_ids, -1)
    return modality_ids


def _can_branch() -> bool:
    """Return whether values can be read here; in a graph or a ``vmap`` the ops check them."""
    return not (torch.compiler.is_compiling() or in_transform() or in_graph_capture())
