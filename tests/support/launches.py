"""Records what a GPU would be given to launch, on a machine without one."""

import functools

import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

# With adapters of a low rank and up to 4,096 rows, by course; decoding is under "cuda" alone.
COUNTS = {"inference": 7, "forward": 7, "backward": 9, "decoding": 2}
# Where the extension multiplies: u2 comes with gate_up, and with many rows an expert the gradients
# of adapters with dA'.
ENGINE_COUNTS = COUNTS | {"inference": 6, "forward": 6, "backward": 7}

# Ops of torch that give memory, and launch nothing.
_ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "set_")


@functools.cache
def _computes(name: str) -> bool:
    """Return whether the torch op "aten::..." does more than to allocate, view or call others."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    every = [getattr(packet, overload) for overload in packet.overloads()]
    # TorchScript alone has those on lists.
    ops = [op for op in every if any("Tensor" in str(r.type) for r in op._schema.returns)]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return packet.__name__ not in _ALLOCATE and not all(
        op.is_view or op.has_kernel_for_dispatch_key(composite) for op in ops
    )


def _innermost(event) -> list[str]:
    """Return the torch ops that compute within an event of the profiler, callers left out."""
    within = [name for child in event.cpu_children for name in _innermost(child)]
    if within or not event.name.startswith("aten::"):
        return within
    return [event.name] if _computes(event.name) else []


def torch_ops_within(call) -> tuple[object, list[str]]:
    """Return what ``call()`` returns, and the torch ops that compute in it.

    Those that C++ calls are among them, which no Python mode sees.
    """
    with profile() as seen:
        returned = call()
    outermost = [event for event in seen.function_events if event.cpu_parent is None]
    return returned, [name for event in outermost for name in _innermost(event)]


class Launches(TorchDispatchMode):
    """Record the launches of Triton's kernels in the interpreter, of native ops and of torch.

    ``names`` are the names in order: a kernel's or a native op's, once for each of its launches, or
    "aten::..." of a torch op that is neither a view nor an allocation, also of those that a native
    op calls. ``of_ops`` returns how many kernels the native ops have launched so far.
    """

    def __init__(self, monkeypatch, of_ops=lambda: 0):
        super().__init__()
        self.names, self._interprets, self._of_ops = [], False, of_ops
        from triton.runtime.interpreter import GridExecutor

        execute = GridExecutor.__call__

        def recorded(executor, *arguments, **options):
            self.names.append(executor.fn.__name__)
            self._interprets = True
            try:
                return execute(executor, *arguments, **options)
            finally:
                self._interprets = False

        monkeypatch.setattr(GridExecutor, "__call__", recorded)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space == "moe_kernels_native":
            return self._of_native_op(name, lambda: func(*args, **(kwargs or {})))
        if not (self._interprets or func.is_view or name in _ALLOCATE):
            self.names.append(f"aten::{name}")
        return func(*args, **(kwargs or {}))

    def _of_native_op(self, name, call):
        self._interprets, before = True, self._of_ops()
        try:
            returned, of_torch = torch_ops_within(call)
        finally:
            self._interprets = False
        self.names += [name] * (self._of_ops() - before) + of_torch
        return returned
