"""Parts that the ops' autograd formulas share, and the ways in which an op is called.

Plain tensors take :func:`plain_function`, functorch's transforms :func:`transformed_function`, and
everything else the registered op. All three have the same formulas, and refuse what those lack:
forward mode and second derivatives.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

PLAIN = (Tensor, nn.Parameter)
_LIBRARIES: list[torch.library.Library] = []  # what one registers lasts as long as it does
Fields = TypeVar("Fields", bound=tuple)


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether an op on these tensors may be computed without the dispatcher.

    It is False where something must see the op: tracing and compilation, a dispatch
    mode of this thread (selective checkpointing, counters of operations), a functorch transform or
    a tensor that outlived it, forward mode differentiation, a tensor's subclass, a meta tensor.
    Elsewhere ``torch.library`` would add a few tenths of a millisecond a layer, forward and
    backward, as much as a small layer's GEMM.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None  # of torch.jit.trace
        and forward_ad._current_level < 0
        and all(map(_is_plain, tensors))
    )


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (
        type(tensor) in PLAIN and not tensor.is_meta and not is_functorch_wrapped_tensor(tensor)
    )


def plain_function(
    name: str, compute: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    """Build the op ``name`` for plain tensors, with its first output alone and its formulas."""

    # With a setup_context of its own PyTorch would inspect the signature at every call.
    def forward(ctx, *arguments):
        output = compute(*arguments)
        setup_context(ctx, arguments, output)
        return output[0]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    # Function's own apply would unwrap what outlived its transform, and plain tensors did not.
    return super(torch.autograd.Function, function).apply


def transformed_function(
    name: str, compute: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """Build the op ``name`` for the transforms of functorch: ``torch.func.grad``, ``vmap`` ...

    They accept neither a registered op's gradients nor a ``forward`` that sees its context.
    """

    def refuse_jvp(ctx, *tangents):
        refuse_forward_mode(name)

    methods = {
        "forward": lambda *arguments: tuple(compute(*arguments)),
        "setup_context": setup_context,
        "backward": backward,
        "jvp": refuse_jvp,
        "vmap": by_element(lambda *arguments: function.apply(*arguments)),
    }
    methods = {key: staticmethod(method) for key, method in methods.items()}
    function = type(name, (torch.autograd.Function,), methods)
    return function


def by_element(op: Callable) -> Callable:
    """Return a rule for ``vmap`` that calls ``op`` once for each element of the batch."""

    def rule(info, in_dims, *arguments):
        each = [
            op(*(_element(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(map(torch.stack, zip(*each, strict=True)))
        return outputs, (0,) * len(outputs)

    return rule


def way(registered: Callable, transformed: type[torch.autograd.Function]) -> Callable:
    """Return how to call an op that :func:`is_plain` did not let go around the dispatcher."""
    if not in_transform():
        return registered
    functorch = torch._C._functorch
    innermost = functorch.peek_interpreter_stack().key()
    return registered if innermost == functorch.TransformType.Functionalize else transformed.apply


def must_save(*tensors: Tensor | None) -> bool:
    """Return whether an op on these tensors must keep what its backward pass needs.

    Within a transform a tensor does not say whether one further out differentiates it. A program
    that ``torch.jit.trace`` makes may be differentiated later.
    """
    if torch._C._get_tracing_state() is not None or in_transform():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_saved(name: str, save_for_backward: bool, needs_input_grad: Iterable[bool]) -> None:
    """Raise RuntimeError if a gradient is asked for of an op that saves nothing for it."""
    if not save_for_backward and any(needs_input_grad):
        raise RuntimeError(
            f"{name} was compiled or exported where nothing required a gradient, and keeps nothing "
            "for a backward pass: compile or export it again with gradients enabled"
        )


def in_transform() -> bool:
    """Return whether a transform of functorch is active; False within a compiled program."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def in_graph_capture() -> bool:
    """Return whether ``make_fx`` or ``torch.func.linearize`` records, whose tensors hide values."""
    return torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a gradient of ``tensor`` is asked for, by any transform around this call."""
    functorch = torch._C._functorch
    while not tensor.requires_grad and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _element(argument: Any, dim: int | None, index: int) -> Any:
    return argument.select(dim, index) if isinstance(dim, int) else argument


def refuse_forward_mode(name: str) -> NoReturn:
    """Raise NotImplementedError: the op ``name`` has no forward-mode derivative."""
    raise NotImplementedError(
        f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian; forward_ad): use "
        "reverse mode (backward(), torch.func.grad, vjp, jacrev)"
    )


def refuse_batched_gradient(name: str, grad_out: Tensor) -> None:
    """Raise NotImplementedError for the gradients of an older ``vmap``, which fit no transform."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_out):
        raise NotImplementedError(
            f"{name} does not take batched gradients (is_grads_batched=True, vectorize=True): use "
            "torch.func.jacrev or vjp, or leave the option out"
        )


def no_second_derivative(name: str) -> dict[str, Callable]:
    """Return formulas of the backward of the op ``name``, which raise where they are needed."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{name} has no second derivative: its gradient cannot be differentiated. "
            "Differentiate once, or take finite differences of gradients"
        )

    return {"setup_context": lambda ctx, inputs, output: None, "backward": backward}


def register_formulas(
    op: torch.library.CustomOpDef, name: str, setup_context: Callable, backward: Callable
) -> None:
    """Register the backward formula of an op, and refuse tangents, which torch would drop.

    Args:
        op: the registered op.
        name: of the op in messages.
        setup_context: as ``torch.library.register_autograd`` takes it.
        backward: likewise.
    """
    op.register_autograd(backward, setup_context=setup_context)
    # torch.library.get_kernel would be public, but the kernel that it gives calls whichever is
    # registered last, itself, where a dispatch mode is active.
    kernel = make_autograd_impl(op._opoverload, op)

    def with_tangents_refused(keyset, *arguments):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            refuse_forward_mode(name)
        if torch._C._are_functorch_transforms_active() and torch._C._any_requires_grad(*arguments):
            raise NotImplementedError(
                f"torch.func cannot differentiate the registered op of {name}, which a compiled "
                "program calls: transform what is not compiled"
            )
        return kernel(keyset, *arguments)

    library = torch.library.Library("moe_kernels", "FRAGMENT")
    _LIBRARIES.append(library)
    with warnings.catch_warnings():  # torch warns that a kernel is replaced
        warnings.simplefilter("ignore")
        library.impl(op._opoverload, with_tangents_refused, "Autograd", with_keyset=True)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def in_dtype_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype of another, at once where there is nothing to do."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


class OpArguments:
    """Names of a registered op's arguments, and positions of those that may take a gradient.

    Args:
        function: the op's function; its signature gives the names.
        differentiable: names of the arguments that may take a gradient, in the order of the
            backward op's ``needs``.
    """

    def __init__(self, function: Callable, differentiable: Sequence[str]):
        self.names = tuple(inspect.signature(function).parameters)
        self.positions = tuple(map(self.names.index, differentiable))

    def group(self, kind: type[Fields]) -> Callable[[Sequence], Fields]:
        """Return how to build a NamedTuple from the arguments with the names of its fields."""
        pick = itemgetter(*map(self.names.index, kind._fields))
        return lambda arguments: kind._make(pick(arguments))

    def by_name(self, arguments: Sequence) -> dict[str, Any]:
        """Map each argument's name to its value."""
        return dict(zip(self.names, arguments, strict=True))

    def needs(self, needs_input_grad: Sequence[bool]) -> list[bool]:
        """Select the entries of ``ctx.needs_input_grad`` that the backward op takes."""
        return [needs_input_grad[position] for position in self.positions]

    def gradients(
        self, needed: Iterable[Tensor] = (), needs: Sequence[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return one gradient for each argument, None where there is none.

        Args:
            needed: the gradients whose entry in ``needs`` is true, in its order.
            needs: as returned by :meth:`needs`; None: no gradient at all.
        """
        grads: list[Tensor | None] = [None] * len(self.names)
        rest = iter(needed)
        for position, need in zip(self.positions, needs or (), strict=needs is not None):
            if need:
                grads[position] = next(rest)
        return tuple(grads)


def select(kind: type[Fields], named: Mapping[str, Any]) -> Fields:
    """Build a NamedTuple from the entries of ``named`` that have the names of its fields."""
    return kind._make(itemgetter(*kind._fields)(named))
