"""Added tokens: rows for a new modality beside the frozen embedding table and head."""

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_kernels.models.methods import get_patched

ROWS = "added_rows"


def add_modality_tokens(
    model: PreTrainedModel,
    modality: str,
    num_tokens: int,
    tokenizer=None,
    init: str = "normal",
    features: Tensor | None = None,
) -> range:
    """Give a patched model ``num_tokens`` tokens of an added modality, with trainable rows.

    The frozen table keeps its name and its bits; the new rows are a second parameter of the
    embedding and, unless the two are tied, of the head. Text generation does not produce them: they
    are added to the model's ``generation_config.suppress_tokens``. ``generate(...,
    suppress_tokens=[])`` allows them; in a ``GenerationConfig`` of your own it must be ``[]`` too,
    as transformers fills None from the model's. ``forward`` never masks their logits.

    Args:
        model: patched by :func:`moe_kernels.patch_model` for this modality.
        modality: its name.
        num_tokens: n, delimiters (begin, end) included. A delimiter before the first token of the
            modality should be one of them, as the mask is that of the input token.
        tokenizer: gets n tokens ``<modality_i>`` under the same ids.
        init: how rows start: "normal" (mean and standard deviation of the text rows), "mean"
            (their mean with a little noise), or "gromov_wasserstein".
        features: (n, d) vectors of the tokens, for inits that use them.

    Returns:
        The new ids, ``range(V, V + n)``.

    Raises:
        ValueError: not patched, an unknown modality or init, tokens of it there already, or a
            tokenizer whose ids cannot be brought in step. Nothing has changed then.
    """
    config = get_patched(model).config
    if modality not in config.modalities:
        raise ValueError(f"the model is patched for {config.modalities}, not for {modality!r}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if modality in _rows(model.get_input_embeddings()):
        raise ValueError(f"the model has tokens of modality {modality!r} already")
    if init not in ROW_INITS:
        raise ValueError(f"unknown init {init!r}; the inits are {', '.join(ROW_INITS)}")
    first = model.token_modality.numel()
    new = _initial_rows(model, num_tokens, init, features)
    if tokenizer is not None:
        _extend_tokenizer(tokenizer, modality, first, num_tokens)
    for module, rows in new.items():
        _add_rows(module, modality, rows)
    if _tied(model):
        head = model.get_output_embeddings()
        head.__dict__[ROWS] = _rows(model.get_input_embeddings())
        head.forward = types.MethodType(_head_forward, head)

    index = config.modalities.index(modality) + 1
    grown = torch.full((num_tokens,), index, device=model.token_modality.device)
    model.token_modality = torch.cat([model.token_modality, grown])
    _set_vocab_size(model, first + num_tokens)
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, *range(first, first + num_tokens)]
    return range(first, first + num_tokens)


def modality_token_ids(model: PreTrainedModel, modality: str) -> range:
    """The ids of a modality's added tokens; empty if there are none."""
    first = model.get_input_embeddings().weight.shape[0]
    for name, rows in _rows(model.get_input_embeddings()).items():
        if name == modality:
            return range(first, first + rows.shape[0])
        first += rows.shape[0]
    return range(0)


def token_counts(model: PreTrainedModel) -> dict[str, int]:
    """Number of added tokens by modality, in the order in which they were added."""
    return {name: rows.shape[0] for name, rows in _rows(model.get_input_embeddings()).items()}


def remove(model: PreTrainedModel) -> None:
    """Take all added rows away; the sizes of the vocabulary are the caller's to restore."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(module, ROWS):
            module.__dict__.pop("forward", None)
            module.__dict__.pop(ROWS, None) if ROWS in module.__dict__ else delattr(module, ROWS)


def vocab_sizes(model: PreTrainedModel) -> dict[nn.Module, int]:
    """The modules that know the size of the vocabulary, and what they hold."""
    modules = (model, getattr(model, model.base_model_prefix, model))
    return {module: module.vocab_size for module in modules if hasattr(module, "vocab_size")}


def _rows(module: nn.Module) -> nn.ParameterDict | dict:
    return getattr(module, ROWS, {})


def _tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _set_vocab_size(model: PreTrainedModel, size: int) -> None:
    model.config.vocab_size = size
    for module in vocab_sizes(model):
        module.vocab_size = size


def _initial_rows(
    model: PreTrainedModel, num_tokens: int, init: str, features: Tensor | None
) -> dict[nn.Module, Tensor]:
    """New rows of the embedding and, unless tied, of the head."""
    modules = [model.get_input_embeddings()]
    if not _tied(model):
        modules.append(model.get_output_embeddings())
    rows = {}
    for module in modules:
        weight = module.weight.detach()
        new = ROW_INITS[init](weight.float(), num_tokens, features)
        half = weight.dtype in (torch.bfloat16, torch.float16)
        rows[module] = new.to(torch.float32 if half else weight.dtype)
    return rows


def _add_rows(module: nn.Module, modality: str, rows: Tensor) -> None:
    if not hasattr(module, ROWS):
        setattr(module, ROWS, nn.ParameterDict())
        forward = _embedding_forward if isinstance(module, nn.Embedding) else _head_forward
        module.forward = types.MethodType(forward, module)
    getattr(module, ROWS)[modality] = nn.Parameter(rows)


def _added(module: nn.Module) -> Tensor:
    """(n, H) all added rows in the order of their ids, in the table's dtype."""
    return torch.cat(list(getattr(module, ROWS).values())).to(module.weight.dtype)


def _embedding_forward(self: nn.Embedding, input_ids: Tensor) -> Tensor:
    first = self.weight.shape[0]
    text = F.embedding(input_ids.clamp(max=first - 1), self.weight, self.padding_idx)
    added = F.embedding((input_ids - first).clamp(min=0), _added(self))
    return torch.where((input_ids >= first)[..., None], added, text)


def _head_forward(self: nn.Linear, hidden_states: Tensor) -> Tensor:
    # Two GEMMs: one over joined weights would change the bits of text logits.
    text = F.linear(hidden_states, self.weight, self.bias)
    return torch.cat([text, F.linear(hidden_states, _added(self))], dim=-1)


def _extend_tokenizer(tokenizer, modality: str, first: int, num_tokens: int) -> None:
    """Add ``<modality_i>`` under the ids from ``first`` on; fillers take ids without a token."""
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary.values(), default=-1)
    if last >= first:
        raise ValueError(
            f"the tokenizer has ids up to {last} but the model's table {first} rows: "
            "resize the model's embeddings before patching"
        )
    if last >= len(vocabulary):
        raise ValueError(
            f"the tokenizer has {len(vocabulary)} tokens but ids up to {last}: added tokens would "
            "fall into the gaps"
        )
    names = [f"<unused_{i}>" for i in range(last + 1, first)]
    names += [f"<{modality}_{i}>" for i in range(num_tokens)]
    if clash := set(names) & set(vocabulary):
        raise ValueError(f"the tokenizer has tokens of these names already: {sorted(clash)[:5]}")
    tokenizer.add_tokens(names, special_tokens=True)


def _normal_rows(table: Tensor, num_tokens: int, features: Tensor | None) -> Tensor:
    mean, std = table.mean(0), table.std(0, correction=0)
    return mean + std * torch.randn(num_tokens, table.shape[1], device=table.device)


def _mean_rows(table: Tensor, num_tokens: int, features: Tensor | None) -> Tensor:
    noise = torch.randn(num_tokens, table.shape[1], device=table.device)
    return table.mean(0) + 0.1 * table.std(0, correction=0) * noise


def _gromov_wasserstein_rows(table: Tensor, num_tokens: int, features: Tensor | None) -> Tensor:
    raise ValueError('init="gromov_wasserstein" is not in this version: use "normal" or "mean"')


# name -> function of the table (V, H), n and features (n, d) or None, returning (n, H)
ROW_INITS: dict[str, Callable[[Tensor, int, Tensor | None], Tensor]] = {
    "normal": _normal_rows,
    "mean": _mean_rows,
    "gromov_wasserstein": _gromov_wasserstein_rows,
}
