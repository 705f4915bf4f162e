"""accelerate's FSDP and DeepSpeed on a CPU, where it otherwise takes DDP without saying so."""

import inspect
import textwrap

from accelerate import state

# what accelerate's choice of an engine says -> what lets gloo processes have it
_CONDITIONS = {
    "elif self.distributed_type in [\n": (
        "elif self.distributed_type in [\nDistributedType.MULTI_CPU,\n"
    ),
    '("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not cpu:': (
        '("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":'
    ),
}


def allow() -> None:
    """Let accelerate honour a plugin of FSDP or DeepSpeed on gloo."""
    source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
    for condition, loosened in _CONDITIONS.items():
        assert source.count(condition) == 1, condition
        source = source.replace(condition, loosened)
    found: dict = {}
    exec(compile(source, state.__file__, "exec"), state.__dict__, found)
    state.AcceleratorState.__init__ = found["__init__"]
