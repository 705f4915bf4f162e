"""Rows of added tokens in a model of PEFT: they train, and are in PEFT's own files.

PEFT freezes all parameters but its own, and its files have no others but whole embedding layers.
"""

import functools
import inspect
import os
import types
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_kernels.models import adapter_files, sharding
from moe_kernels.models.handle import PatchState
from moe_kernels.models.parameters import named_adapter_parameters
from moe_kernels.models.undo import all_or_nothing


def bind_rows(model: nn.Module, patched: PatchState, train: bool) -> list[Callable[[], object]]:
    """Let the rows of added tokens be saved and loaded with PEFT's adapters; return how to undo it.

    Args:
        model: of PEFT.
        patched: the patch within.
        train: let the rows train too.
    """
    from peft import PeftModel

    rows = _added_rows(patched.model)
    # No methods of built-in types here: deepcopy would leave them those of the original.
    undo = [functools.partial(_freeze_others, patched, [row for row in rows if row.requires_grad])]
    for row in rows if train else ():
        row.requires_grad_(True)
    saving = [each for each in model.modules() if isinstance(each, PeftModel)]
    for each in saving:
        for name, method in (("save_pretrained", _save), ("load_adapter", _load)):
            setattr(each, name, types.MethodType(method, each))
            undo.append(functools.partial(delattr, each, name))
        undo.append(each.register_state_dict_pre_hook(_refuse_sharded_files).remove)
    if not saving:
        warnings.warn(
            "PEFT's save_pretrained leaves out rows of added tokens, as this is no PeftModel but a "
            "module within: call accelerate_peft with the PeftModel, or save the rows by "
            "patched.save_adapter",
            stacklevel=4,
        )
    return undo


def _added_rows(model: nn.Module) -> list[nn.Parameter]:
    return [row for _, row in named_adapter_parameters(model)]


def _freeze_others(patched: PatchState, trained: Collection[nn.Parameter]) -> None:
    """Freeze rows, those that came later too, but those that trained before; say what is lost."""
    rows = _added_rows(patched.model)
    before = set(trained)
    for row in rows:
        row.requires_grad_(row in before)
    if rows:
        warnings.warn(
            "after undo() PEFT's save_pretrained leaves out the rows of added tokens: "
            "patched.save_adapter writes them, or save before undo()",
            stacklevel=3,
        )


# --- files


def _save(self: nn.Module, save_directory: str | os.PathLike, *args, **kwargs) -> object:
    """Save as PEFT does, with the rows of added tokens, unless told otherwise.

    PEFT would save whole embedding layers, and loading would put the frozen tables of this base in
    place of another's, of another precision perhaps. Their tables are left out here.
    """
    save, rows = type(self).save_pretrained, _added_rows(self)
    given = inspect.signature(save).bind(self, save_directory, *args, **kwargs)
    names = given.arguments.get("selected_adapters") or self.peft_config
    for folder in (Path(save_directory, "" if name == "default" else name) for name in names):
        adapter_files.check_not_earlier(folder)
    if not rows or given.arguments.get("save_embedding_layers", "auto") != "auto":
        return save(*given.args, **given.kwargs)
    given.arguments["save_embedding_layers"] = True
    tables = _names_of_tables(self)
    if kwargs.get("state_dict") is not None:
        state = {name: each for name, each in kwargs["state_dict"].items() if name not in tables}
        given.arguments["kwargs"]["state_dict"] = state
    with self.register_state_dict_post_hook(functools.partial(_leave_out, tables)):
        return save(*given.args, **given.kwargs)


def _names_of_tables(model: nn.Module) -> set[str]:
    """Return the names of the base's parameters in embedding and head."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if any(module is table for table in tables)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def _leave_out(
    names: Collection[str], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict
) -> None:
    for name in names:
        state.pop(f"{prefix}{name}", None)


def _load(self: nn.Module, model_id: object, adapter_name: str, *args, **kwargs):
    """Load as PEFT does, unless a new adapter's file would replace the rows that others use."""
    load, rows = type(self).load_adapter, _added_rows(self)
    if adapter_name in self.peft_config:  # it brings its own rows back, as Trainer does
        return load(self, model_id, adapter_name, *args, **kwargs)
    before = [sharding.local(row).detach().clone() for row in rows]
    with all_or_nothing(self, values=rows):
        result = load(self, model_id, adapter_name, *args, **kwargs)
        now = map(sharding.local, rows)
        if not all(map(torch.equal, now, before)):
            raise ValueError(
                f"{model_id} has other rows of added tokens than this model, whose adapters "
                f"{list(self.peft_config)} share them: save it with save_embedding_layers=False, "
                "or load it over an adapter of the model (adapter_name=...) or into another model"
            )
        return result


def _refuse_sharded_files(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise RuntimeError where checkpoints of accelerate would leave out rows that train.

    accelerate's FSDP asks for this state when it shards the model, and for each checkpoint.
    """
    if _writes_shards() and any(row.requires_grad for row in _added_rows(model)):
        raise RuntimeError(
            "checkpoints of FSDP by SHARDED_STATE_DICT hold PEFT's adapters without the rows of "
            "added tokens, which would be lost on resuming: set state_dict_type to FULL_STATE_DICT "
            "(fsdp_config, fsdp_state_dict_type)"
        )


def _writes_shards() -> bool:
    """Return whether accelerate runs FSDP whose ranks write their parts of a state each."""
    from accelerate.state import AcceleratorState, is_initialized

    plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if is_initialized() else None
    return plugin is not None and plugin.state_dict_type.name != "FULL_STATE_DICT"
