"""Records what a GPU would be given to launch, on a machine without one."""

from torch.utils._python_dispatch import TorchDispatchMode

# Ops of torch that give memory, and launch nothing.
_ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "set_")


class Launches(TorchDispatchMode):
    """Record the launches of Triton's kernels in the interpreter, of native ops and of torch.

    ``names`` are the names in order: a kernel's or a native op's, once for each of its launches, or
    "aten::..." of a torch op that is neither a view nor an allocation. ``of_ops`` returns how many
    kernels the native ops have launched so far.
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
            self._interprets, before = True, self._of_ops()
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self._interprets = False
                self.names += [name] * (self._of_ops() - before)
        if not (self._interprets or func.is_view or name in _ALLOCATE):
            self.names.append(f"aten::{name}")
        return func(*args, **(kwargs or {}))
