"""Loading a base model and its adapter in one call."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels.files import why_no_folder
from moe_kernels.models import adapter_files
from moe_kernels.models.config import ModalityLoraConfig
from moe_kernels.models.patch import PatchedModel, patch_model


def load(
    base: str | Path | PreTrainedModel,
    adapter: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    backend: str | None = None,
    **options: Any,
) -> PatchedModel:
    """Load a base model, patch it as its adapter asks, and load the adapter into it.

    The adapter's files are read first, so that none that is missing costs the loading of a base.
    A base of the hub is loaded at the revision that the adapter was trained on, if it has the name
    that the adapter knows and no other ``revision`` is given.

    Args:
        base: folder or hub id for ``AutoModelForCausalLM.from_pretrained``; or a model, which is
            patched in place: one of another class, such as of a multimodal model, comes so.
        adapter: folder that ``save_adapter`` has written.
        tokenizer: gets the names of the added tokens, as in ``PatchedModel.load_adapter``.
        backend: as in :class:`moe_kernels.ModalityLoraConfig`.
        **options: of ``from_pretrained``, such as ``dtype``, ``device_map`` and ``revision``.

    Returns:
        The handle of the model; ``.model`` is the model, in the mode that ``from_pretrained``
        leaves it in, eval.

    Raises:
        FileNotFoundError: the folder has no adapter.
        OSError: there is no such folder of a base, and the hub has none, or cannot be asked.
        ValueError: the adapter does not fit the base, or a file is damaged. A model that was given
            is unpatched then.
        TypeError: an argument is of another type, or options are given beside a model.

    Example:
        >>> from moe_kernels import add_modality_tokens, load, patch_model
        >>> from moe_kernels.testing import tiny_model
        >>> patched = patch_model(tiny_model())
        >>> ids = add_modality_tokens(patched.model, "image", 10)
        >>> patched.save_adapter("my-adapter")
        >>> patched = load(tiny_model(), "my-adapter")  # or load("allenai/OLMoE-1B-7B-0924", ...)
        >>> patched.modality_token_ids("image")
        range(64, 74)
    """
    if not isinstance(base, str | os.PathLike | PreTrainedModel):
        raise TypeError(
            "base must be a folder, a hub id or a model that is not patched; got "
            f"{type(base).__name__}"
        )
    if not isinstance(adapter, str | os.PathLike):
        raise TypeError(f"adapter must be a folder; got {type(adapter).__name__}")
    config = ModalityLoraConfig.from_adapter(adapter, backend=backend)
    if isinstance(base, PreTrainedModel):
        if options:
            raise TypeError(f"{', '.join(options)}: for from_pretrained, but base is a model")
        model = base
    else:
        options = _with_revision(str(base), Path(adapter), options)
        with finding(base):
            model = AutoModelForCausalLM.from_pretrained(base, **options)
    patched = patch_model(model, config)
    try:
        patched.load_adapter(adapter, tokenizer)
    except BaseException:
        patched.unpatch()
        raise
    return patched


@contextmanager
def finding(model: str | Path) -> Iterator[None]:
    """Name the folder that is not there in what transformers raises within of a model.

    Raises:
        FileNotFoundError: there is no such folder, and by the hub's rules no such model.
        OSError: nor did the hub give one of this name.
    """
    missing = why_no_folder(model)
    if missing and (Path(model).exists() or not _may_be_on_the_hub(str(model))):
        raise FileNotFoundError(f"no model: {missing}")
    try:
        yield
    except OSError as error:
        if missing is None or error.errno is not None:  # a disk's
            raise
        raise OSError(
            f"no model: {missing}, and none of this name from the hub: {error}"
        ) from error


def _may_be_on_the_hub(name: str) -> bool:
    """Return whether a name follows the hub's rules."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _with_revision(base: str, adapter: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` with the revision that the adapter recorded."""
    if "revision" in options or Path(base).is_dir():
        return options
    with adapter_files.opened(adapter) as file:
        trained_on = adapter_files.read_config(file)["base_model"]
    if trained_on["name_or_path"] != base or not trained_on.get("revision"):
        return options
    return options | {"revision": trained_on["revision"]}
