"""Everything that the library may change in a model, a tokenizer and a handle, to be compared."""

from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from moe_kernels.models.handle import HANDLE

_LOOKED_INTO = (PretrainedConfig, GenerationConfig)


def state_of(model: nn.Module, tokenizer=None) -> dict[str, object]:
    """Return the state by place: structure, flags, hooks, settings, and values bit for bit.

    It is written without the library's own code for undoing. Objects count as themselves: a model
    with a copy of a config, or of a parameter, is another one.
    """
    state = {name: _describe(vars(module)) for name, module in model.named_modules()}
    if (patched := vars(model).get(HANDLE)) is not None:
        switches = patched.switches
        state["handle"] = _describe(vars(patched))
        state["switches"] = switches.uses_adapters(), switches.uses_added_experts()
    if tokenizer is not None:
        state["tokenizer"] = len(tokenizer), tokenizer.get_vocab(), tokenizer.all_special_tokens
    return state


def differences(actual: dict, expected: dict) -> list[str]:
    """Return the places at which two states differ, with the names of what differs there."""
    found = []
    for place in sorted(actual.keys() | expected.keys()):
        a, e = actual.get(place), expected.get(place)
        if a != e:
            inside = isinstance(a, dict) and isinstance(e, dict)
            names = sorted(k for k in a.keys() | e.keys() if a.get(k) != e.get(k)) if inside else ""
            found.append(f"{place or 'the model'}: {names}")
    return found


def _describe(value: object) -> object:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().numpy().tobytes() if value.numel() else b""
        return id(value), str(value.dtype), value.requires_grad, value.grad is None, data
    if isinstance(value, dict):
        return {str(name): _describe(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(each) for each in value]
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, _LOOKED_INTO):
        return {"id": id(value)} | {str(k): _describe(v) for k, v in vars(value).items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return id(value)
