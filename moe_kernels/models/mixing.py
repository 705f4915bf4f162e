"""Layers in a linear one's place in which a row's bits depend on other rows, found by trial.

Text would change with the pictures beside it there. LLM.int8 computes those columns in 16 bits that
are large in any row, and some layers have one scale for all rows of a batch, also beside a plain
weight.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_kernels.models import offload, sharding
from moe_kernels.models.instance_forward import has_own_forward
from moe_kernels.models.quantisation import has_packed_weights, is_codes, is_packed
from moe_kernels.models.trial_copies import kind, same_bits, trial_copy

_TRIED = 8  # rows
_WIDTHS = ("in_features", "infeatures")  # names of a linear layer's input size
_KNOWN = ("torch.nn.modules.", "transformers.models.")
_MILDER = 100.0  # times the other rows
_USE = "let it compute each row by itself, or use nn.Linear there"
_USE_OF_PACKED = (
    "load it unquantised, or with a scale for each row of activations (LLM.int8 with "
    "llm_int8_threshold=0)"
)


@torch.no_grad()
def linear_problem(decoder: nn.Module, dtype: torch.dtype) -> str | None:
    """Return why text might change with pictures in a layer that computes a linear one's output.

    Layers that are not nn.Linear are tried, one of each kind: a copy computes rows of which some
    get huge, and the others must keep their bits. Layers on the device meta have no values to try.
    """
    tried: set[Hashable] = set()
    for name, module in decoder.named_modules():
        if "parametrizations" in name.split(".") or not _may_mix(module):
            continue
        if (found := kind(module)) in tried:
            continue
        tried.add(found)
        layer = f"{name} ({sharding.plain_class(module).__name__})"
        use = _USE_OF_PACKED if has_packed_weights(module) else _USE
        try:
            mixes = _mixes(module, dtype)
        except Exception as error:  # of any library
            if not _is_linear(module):
                continue  # another module that has a matrix
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            return (
                f"whether text would change with pictures cannot be tried in {layer}, which does "
                f"not run by itself ({why}): {use}"
            )
        if mixes:
            return (
                f"the bits of a row of {layer} depend on other rows, so that text would change "
                f"with pictures: {use}"
            )
    return None


def _may_mix(module: nn.Module) -> bool:
    """Return whether a module may stand in a linear layer's place without computing as nn.Linear.

    The classes of transformers' models do not mix rows unless a quantiser has changed them.
    """
    cls = sharding.plain_class(module)
    known = cls.forward is nn.Linear.forward or cls.__module__.startswith(_KNOWN)
    changed = has_own_forward(module) or any(map(is_packed, module.parameters(recurse=False)))
    if isinstance(module, nn.Embedding) or (known and not changed):
        return False
    return _is_linear(module) or (not known and getattr(_own_matrix(module), "ndim", 0) == 2)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module says that it is a linear layer, or stores a matrix as codes."""
    if isinstance(module, nn.Linear) or any(hasattr(module, name) for name in _WIDTHS):
        return True
    known = sharding.plain_class(module).__module__.startswith(_KNOWN)
    return not known and (matrix := _own_matrix(module)) is not None and is_packed(matrix)


def _own_matrix(module: nn.Module) -> Tensor | None:
    """Return a module's own packed weight, or its weight, or None."""
    own = dict(module.named_parameters(recurse=False))
    packed = [*filter(is_codes, module.buffers(recurse=False)), *filter(is_packed, own.values())]
    return packed[0] if packed else own.get("weight")


def _mixes(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether rows of a layer depend on others.

    Args:
        module: the layer; copies of it compute.
        dtype: of its rows, unless its weight is of floats.

    Raises:
        ValueError: it is sharded already.
        Exception: its own, if it does not take rows.
    """
    own = [*module.parameters(), *module.buffers()]
    if any(map(sharding.is_sharded, own)):
        raise ValueError("it is sharded already: patch the model before")
    device = offload.device_of(module, own[0]) if own else torch.device("cpu")
    if device.type == "meta":
        return False
    matrix = _own_matrix(module)
    if matrix is not None and not is_packed(matrix):
        dtype = matrix.dtype
    width = next((getattr(module, n) for n in _WIDTHS if hasattr(module, n)), None)
    width = matrix.shape[-1] if width is None else width
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_TRIED, width, generator=generator, dtype=torch.float32, device="cpu")
    # In two sequences: rows may be mixed in each of them, or at each place in them.
    rows = rows.to(device, dtype).view(2, -1, width)
    return any(_mixes_in_mode(module, rows, training) for training in (False, True))


def _mixes_in_mode(module: nn.Module, rows: Tensor, training: bool) -> bool:
    """Return whether the first rows change with the others; False if each run gives others."""
    layer = trial_copy(module).train(training)
    first = _first_rows(layer, rows)
    largest = torch.finfo(rows.dtype).max / (4 * rows.abs().max().item())
    try:
        second = _first_rows(layer, _enlarged(rows, largest))
    except Exception:  # some layers refuse an overflow
        layer = trial_copy(module).train(training)
        first, second = (_first_rows(layer, each) for each in (rows, _enlarged(rows, _MILDER)))
    if same_bits(first, second):
        return False
    layer = trial_copy(module).train(training)
    _first_rows(layer, rows)  # may set a scale for the next batch
    return same_bits(_first_rows(layer, rows), _first_rows(layer, rows))


def _enlarged(rows: Tensor, factor: float) -> Tensor:
    """Return rows (2, n, width) of which all but the first are larger."""
    larger = rows * factor
    larger[0, : _TRIED // 4] = rows[0, : _TRIED // 4]
    return larger


def _first_rows(layer: nn.Module, batch: Tensor) -> Tensor:
    """Return what a layer computes of a batch's first rows, with the same dropout each time."""
    with _seeded(batch.device):
        output = layer(batch)
    if not isinstance(output, Tensor) or output.shape[:2] != batch.shape[:2]:
        raise TypeError("it gives no row for each row")
    return output[0, : _TRIED // 4]


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and a device, and put them back; no other is touched.

    ``torch.manual_seed`` seeds those of all devices, which ``fork_rng`` does not put back.
    """
    generators = [torch.random.default_generator]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        of_device = getattr(module, "default_generators", ())
        index = module.current_device() if device.index is None else device.index
        generators += of_device[index : index + 1]
    states = [(each, each.get_state()) for each in generators]
    try:
        for each in generators:
            each.manual_seed(0)
        yield
    finally:
        for each, state in states:
            each.set_state(state)
