"""accelerate's FSDP on a CPU, where it otherwise takes DDP without saying so."""

import inspect
import textwrap

from accelerate import state

_CONDITION = "elif self.distributed_type in [\n"


def allow() -> None:
    """Let accelerate honour an FSDP plugin on gloo: one condition names its devices."""
    source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
    assert source.count(_CONDITION) == 1
    source = source.replace(_CONDITION, f"{_CONDITION}DistributedType.MULTI_CPU,\n")
    found: dict = {}
    exec(compile(source, state.__file__, "exec"), state.__dict__, found)
    state.AcceleratorState.__init__ = found["__init__"]
