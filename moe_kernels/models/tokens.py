"""Added tokens: rows for a new modality beside the frozen embedding table and head."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import arguments
from moe_kernels.init.rows import (
    GromovWassersteinDiagnostics,
    check_row_init,
    initial_rows,
)
from moe_kernels.layers.modality_lora import DEFAULT, name_for, split_name
from moe_kernels.layers.resident import Resident
from moe_kernels.layers.whole import whole
from moe_kernels.models import offload, sharding
from moe_kernels.models.context import Chosen, Switches
from moe_kernels.models.handle import get_patched
from moe_kernels.models.instance_forward import reset_forward, set_forward
from moe_kernels.models.parts import find_decoder, trainable_dtype
from moe_kernels.models.undo import all_or_nothing

ROWS = "added_rows"
_SWITCHES = "_modality_switches"


def add_modality_tokens(
    model: PreTrainedModel,
    modality: str,
    num_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    init: str = "normal",
    features: Tensor | None = None,
    num_delimiters: int = 0,
    **init_options: Any,
) -> range:
    """Give a patched model ``num_tokens`` tokens of an added modality, with trainable rows.

    The frozen table keeps its name and its bits; the new rows are a second parameter of the
    embedding and, unless the two are tied, of the head. Text generation does not produce the new
    tokens: they are added to the model's ``generation_config.suppress_tokens``, and ``generate``
    masks their logits before any softmax. ``generate(..., suppress_tokens=[])`` allows them, and so
    does a ``GenerationConfig`` with ``suppress_tokens=[]``, or a list that has some of them. A list
    of other tokens alone does not.
    ``forward`` gives their logits, except within ``patched.text_only()``.

    Args:
        model: patched by :func:`moe_kernels.patch_model` for this modality.
        modality: its name.
        num_tokens: n, delimiters (begin, end) included. A delimiter before the first token of the
            modality should be one of them, because adapters act by the modality of the input token.
        tokenizer: gets n tokens ``<modality_i>`` under the same ids.
        init: how new rows are drawn from the text rows, those of the embedding and, unless tied,
            those of the head: "normal" (their mean and standard deviation), "gaussian" (their mean
            and covariance), "mean" (their mean with a little noise), "gromov_wasserstein" (rows
            whose distances resemble those of the features:
            :func:`moe_kernels.init.gromov_wasserstein_rows`) or "permuted" (the same in random
            order, a control).
        features: (n - num_delimiters, d) vectors of the tokens, such as a codebook, for
            "gromov_wasserstein" and "permuted".
        num_delimiters: number of tokens, the first of the n, that have no features: 2 for begin
            and end of :class:`moe_kernels.imaging.ImageVocabulary`. Beside features they start as
            with "normal".
        **init_options: keywords of :func:`moe_kernels.init.gromov_wasserstein_rows`.

    Returns:
        The new ids, ``range(V, V + n)``. Diagnostics of a Gromov-Wasserstein init are in
        ``patched.init_diagnostics[modality]``, by "embedding" and "head".

    Raises:
        ValueError: the model is not patched, the modality or init is unknown, the modality has
            tokens already, the features do not match n, or the tokenizer's ids cannot match the
            model's.
        TypeError: an option that the init does not have.
        ImportError: the init needs POT.
        RuntimeError: POT's coupling cannot be used. Nothing has changed after any of these.

    Example:
        >>> import torch
        >>> from moe_kernels import add_modality_tokens, patch_model
        >>> from moe_kernels.testing import tiny_model
        >>> model = tiny_model()  # of 64 tokens
        >>> patched = patch_model(model)
        >>> add_modality_tokens(model, "image", 10)
        range(64, 74)
        >>> model(torch.tensor([[1, 2, 64, 66]])).logits.shape
        torch.Size([1, 4, 74])
    """
    patched = get_patched(model)
    patched.modality_id(modality)
    num_tokens, num_delimiters = arguments.integers(
        num_tokens=num_tokens, num_delimiters=num_delimiters
    )
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if modality in patched.added_tokens:
        raise ValueError(
            f"the model has tokens of modality {modality!r} already: add all of them in one call, "
            "after unpatch() and a new patch_model()"
        )
    if problem := sharding.problem(model) or _other_table(model):
        raise ValueError(f"tokens cannot be added: {problem}")
    sharding.reshard(model)
    check_row_init(init, num_tokens, num_delimiters, features, init_options)
    first = patched.vocabulary
    new, diagnostics = _initial_rows(
        model,
        num_tokens=num_tokens,
        init=init,
        num_delimiters=num_delimiters,
        features=features,
        **init_options,
    )
    ids = range(first, first + num_tokens)
    names = _names_after(tokenizer, ids.start, _named(modality, ids))
    with all_or_nothing(model, tokenizer):
        names.add()
        _attach_rows(model, modality, new)
        if diagnostics:
            patched.init_diagnostics[modality] = diagnostics
        patched.added_tokens[modality] = num_tokens
        _grow_vocabulary(model, ids)
        return ids


def _other_table(model: PreTrainedModel) -> str | None:
    """Return what else of a model has an entry for each token, which added ones would lack."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    size, decoder = table.num_embeddings, get_patched(model).decoder
    for name, module in decoder.named_modules():
        other = isinstance(module, nn.Embedding) and module is not table and module is not head
        if other and module.num_embeddings == size:
            return f"{type(decoder).__name__}.{name} has a row for each token too"
    for name, each in decoder.named_buffers():
        if not each.is_floating_point() and each.ndim and each.shape[0] == size:
            return f"{type(decoder).__name__}.{name} has an entry for each token too"
    if getattr(model.config.get_text_config(), "unpadded_vocab_size", None) is not None:
        return "the model cuts its logits to config.unpadded_vocab_size"
    return None


def _attach_rows(model: PreTrainedModel, modality: str, new: dict[nn.Module, Tensor]) -> None:
    head = model.get_output_embeddings()
    for module, rows in new.items():
        module.__dict__[_SWITCHES] = head.__dict__[_SWITCHES]
        patched = get_patched(model)
        _add_rows(module, modality, rows, patched.adapter_names, patched.active_adapter)
    if head not in new:
        head.__dict__[ROWS] = _rows(model.get_input_embeddings())


def _grow_vocabulary(model: PreTrainedModel, ids: range) -> None:
    """Let the model's sizes and generation settings know the new ids."""
    _set_vocab_size(model, ids.stop)
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, *ids]


def modules_with_rows(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embedding and, unless it shares the embedding's rows, the head.

    Without rows of its own yet, a head that is tied will share them. Loading by ``assign=True``
    unties the weights; the rows stay shared.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if hasattr(head, ROWS):
        shared = ROWS in head.__dict__
    else:
        shared = table.weight is head.weight or bool(offload.tied_copies(model))
    return {"embedding": table} if shared else {"embedding": table, "head": head}


def attach_head(model: PreTrainedModel, switches: Switches) -> None:
    """Let the head give logits of the rows that are added later, or compute the loss itself."""
    head = model.get_output_embeddings()
    head.__dict__[_SWITCHES] = switches
    set_forward(head, _head_forward)


def remove(model: PreTrainedModel) -> None:
    """Undo :func:`attach_head` and remove all rows; the caller restores the vocabulary's sizes."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(module, ROWS) or _SWITCHES in module.__dict__:
            reset_forward(module)
        module.__dict__.pop(_SWITCHES, None)
        if hasattr(module, ROWS):
            module.__dict__.pop(ROWS, None) if ROWS in module.__dict__ else delattr(module, ROWS)


def vocab_sizes(model: PreTrainedModel) -> dict[nn.Module, int]:
    """Return the vocabulary's size in each module that keeps it."""
    modules = (model, model.base_model, find_decoder(model))
    return {each: each.vocab_size for each in modules if hasattr(each, "vocab_size")}


def set_config_vocab_size(config: PretrainedConfig, size: int) -> None:
    """Set the vocabulary's size where a configuration keeps it: in that of the text model."""
    text = config.get_text_config()
    if text is not config and getattr(config, "vocab_size", None) == text.vocab_size:
        config.vocab_size = size
    text.vocab_size = size


def _rows(module: nn.Module) -> "AddedRows | dict":
    return getattr(module, ROWS, {})


def all_rows(model: PreTrainedModel) -> "list[AddedRows]":
    """Return the added rows of the embedding and of the head, if it has rows of its own."""
    return [rows for module in modules_with_rows(model).values() if len(rows := _rows(module))]


def _set_vocab_size(model: PreTrainedModel, size: int) -> None:
    set_config_vocab_size(model.config, size)
    for module in vocab_sizes(model):
        module.vocab_size = size


def _initial_rows(
    model: PreTrainedModel, **options
) -> tuple[dict[nn.Module, Tensor], dict[str, GromovWassersteinDiagnostics]]:
    """Draw rows of the embedding and, unless tied, of the head; return them with diagnostics."""
    rows, diagnostics = {}, {}
    for name, module in modules_with_rows(model).items():
        weight = sharding.gather(offload.value(module, "weight"))
        new, report = initial_rows(weight, **options)
        rows[module] = new.to(trainable_dtype(weight))
        if report is not None:
            diagnostics[name] = report
    return rows, diagnostics


class AddedRows(Resident, nn.ParameterDict):
    """Added rows (n, H) by modality, in the order of their ids.

    Those of a further adapter are ``modality@NAME``, of the same shapes.
    """

    def of(self, adapter: str = DEFAULT) -> dict[str, nn.Parameter]:
        """Return an adapter's rows by modality."""
        named = {split_name(key): rows for key, rows in self.items()}
        return {key: rows for (key, owner), rows in named.items() if owner == adapter}

    def joined(self, adapter: str = DEFAULT) -> Tensor:
        """Return an adapter's rows of all modalities."""
        return torch.cat([whole(rows) for rows in self.of(adapter).values()])

    def copy_for(self, adapter: str, like: str) -> None:
        """Make the rows of a further adapter, with the values of another one's."""
        for modality, rows in self.of(like).items():
            self[name_for(modality, adapter)] = nn.Parameter(rows.detach().clone())


def _add_rows(
    module: nn.Module, modality: str, rows: Tensor, adapters: Iterable[str], active: str
) -> None:
    if not hasattr(module, ROWS):
        setattr(module, ROWS, AddedRows())
        if isinstance(module, nn.Embedding):
            set_forward(module, _embedding_forward)
    added = getattr(module, ROWS)
    for adapter in adapters:
        own = nn.Parameter(rows.clone(), requires_grad=adapter == active)
        added[name_for(modality, adapter)] = own
    sharding.shard_beside(added, module.weight)


def _added(module: nn.Module, adapter: str) -> Tensor:
    """Return an adapter's rows (n, H) in the order of their ids, in the table's dtype."""
    return _rows(module).joined(adapter).to(module.weight.dtype)


def _joined_rows(module: nn.Module) -> Tensor | None:
    """Return the rows (n, H) of the batch's adapter in their own dtype; None: there are none."""
    if not len(rows := _rows(module)):
        return None
    chosen: Chosen = module.__dict__[_SWITCHES].chosen()
    if chosen.of_sequence is not None:
        raise RuntimeError(
            "a loss that reads the head's rows by itself (fused_loss) takes batches of one "
            f"adapter, and this one has {', '.join(chosen.names)}: split it, or leave the fused "
            "loss out"
        )
    return rows.joined(chosen.names[0])


def _num_added(module: nn.Module) -> int:
    return sum(sharding.whole_shape(rows)[0] for rows in getattr(module, ROWS).of().values())


def _embedding_forward(self: nn.Embedding, input_ids: Tensor) -> Tensor:
    first = self.weight.shape[0]
    text = type(self).forward(self, input_ids.clamp(max=first - 1))
    chosen: Chosen = self.__dict__[_SWITCHES].chosen()
    index = (input_ids - first).clamp(min=0)
    if chosen.of_sequence is None:
        rows = _added(self, chosen.names[0])
    else:
        _check_sequences(input_ids, chosen.of_sequence, "input_ids")
        index = index + _num_added(self) * chosen.places_of_rows()[:, None]
        rows = torch.cat([_added(self, name) for name in chosen.names])
    added = embed(index, self, rows)
    return torch.where((input_ids >= first)[..., None], added, text)


def _check_sequences(values: Tensor, of_sequence: Tensor, what: str) -> None:
    if values.ndim < 2 or len(values) != len(of_sequence):
        raise ValueError(
            f"{what} of shape {tuple(values.shape)} do not say which of the batch's "
            f"{len(of_sequence)} sequences a row is of, and these have different adapters: pass "
            "one row of the batch's shape a sequence, or one adapter at a time"
        )


def _logits_of_rows(module: nn.Linear, hidden_states: Tensor) -> Tensor:
    """Return the logits of added rows, by the adapter of each sequence."""
    chosen: Chosen = module.__dict__[_SWITCHES].chosen()
    if chosen.of_sequence is None:
        return F.linear(hidden_states, _added(module, chosen.names[0]))
    _check_sequences(hidden_states, chosen.of_sequence, "hidden states")
    logits = hidden_states.new_zeros(*hidden_states.shape[:-1], _num_added(module))
    for number, name in enumerate(chosen.names):
        here = (chosen.places_of_rows() == number).nonzero()[:, 0]
        own = F.linear(hidden_states.index_select(0, here), _added(module, name))
        logits = logits.index_copy(0, here, own.to(logits.dtype))
    return logits


def embed(input_ids: Tensor, table: nn.Embedding, rows: Tensor) -> Tensor:
    """Look up rows (n, H) as the table's class does, which may scale or normalise them."""
    if sharding.plain_class(table) is nn.Embedding:
        return F.embedding(input_ids, rows)
    like = copy.copy(table)
    like.__dict__ |= {"_parameters": table._parameters | {"weight": rows}, "padding_idx": None}
    return type(table).forward(like, input_ids)


def _head_forward(self: nn.Linear, hidden_states: Tensor) -> Tensor:
    switches: Switches = self.__dict__[_SWITCHES]
    if (call := switches.call) is not None:
        call.head_ran = True
        if call.fused_loss is not None:
            if switches.uses_added_tokens():
                rows = _joined_rows(self)
            else:
                rows, hidden_states = None, beside_rows(hidden_states, self)
            return call.fused_loss(hidden_states, self.weight, self.bias, rows)
    # Two GEMMs: one over joined weights would change the bits of text logits.
    text = F.linear(hidden_states, self.weight, self.bias)
    if not _rows(self):
        return text
    if switches.masks_added_tokens():
        added = text.new_full((*text.shape[:-1], _num_added(self)), torch.finfo(text.dtype).min)
    elif switches.uses_added_tokens():
        added = _logits_of_rows(self, hidden_states)
    else:
        return beside_rows(text, self)
    return torch.cat([text, added], dim=-1)


def beside_rows(values: Tensor, module: nn.Module) -> Tensor:
    """Return values that give the module's added rows a gradient of zero, where ranks train.

    The rows of other ranks may take part in this step, and engines sum gradients over all ranks.
    """
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return values
    rows = _joined_rows(module) if dist.get_world_size() > 1 else None
    return values if rows is None else _Beside.apply(values, rows)


class _Beside(torch.autograd.Function):
    """Identity of the first input; the second takes part with a gradient of zero."""

    @staticmethod
    def forward(values: Tensor, rows: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.rows = inputs[1].shape, inputs[1].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.rows
        return grad, grad.new_zeros(shape, dtype=dtype)


class JoinedHead:
    """The head as a fused loss reads it, with ``weight`` (V + n, H) of text and added rows.

    All else is the head's own. The rows get gradients through ``weight``, whose text rows are the
    frozen ones, bit for bit.
    """

    def __init__(self, head: nn.Linear):
        self._head = head

    def __getattr__(self, name: str) -> object:
        return getattr(self._head, name)

    @property
    def weight(self) -> Tensor:
        """Text rows, then added rows, (V + n, H)."""
        head = self._head
        if offload.is_offloaded(head):
            raise RuntimeError(
                "a fused head reads the weight of lm_head without calling it, and accelerate has "
                "offloaded it: keep lm_head out of the offloading (device map), or use "
                "patched.fused_loss = True in transformers' Trainer"
            )
        adapter = head.__dict__[_SWITCHES].chosen().names[0]
        rows = {name: whole(each) for name, each in getattr(head, ROWS).of(adapter).items()}
        for name, each in (("weight", head.weight), *rows.items()):
            partitioned = hasattr(each, "ds_status")  # ZeRO-3, even if it is gathered by chance now
            if type(each.data) is not Tensor or partitioned or each.shape[0] == 0:
                raise RuntimeError(
                    f"a fused head cannot read the {name} of lm_head, which is sharded "
                    f"({type(each.data).__name__}, {tuple(each.shape)}): shard the head in one "
                    "unit with the whole model (FSDP2), or use patched.fused_loss = True in "
                    "transformers' Trainer"
                )
        return torch.cat([head.weight, *(each.to(head.weight.dtype) for each in rows.values())])

    @property
    def bias(self) -> Tensor | None:
        """The head's bias with zeros for the added rows, or None."""
        bias = self._head.bias
        return None if bias is None else F.pad(bias, (0, _num_added(self._head)))


@dataclass(frozen=True)
class NewNames:
    """Names of added tokens that a tokenizer lacks; without a tokenizer there are none."""

    tokenizer: PreTrainedTokenizerBase | None
    names: list[str]

    def add(self) -> None:
        """Let the tokenizer take over a copy that has them: what is added cannot be removed."""
        if self.names:
            grown = copy.deepcopy(self.tokenizer)
            grown.add_tokens(self.names, special_tokens=True)
            vars(self.tokenizer).update(vars(grown))


def check_tokenizer(tokenizer: Any) -> None:
    """Raise TypeError unless this is a tokenizer of transformers."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer must be a tokenizer of transformers; got {type(tokenizer).__name__}: load "
            "it by AutoTokenizer.from_pretrained"
        )


def find_names(
    tokenizer: PreTrainedTokenizerBase | None, first: int, added_tokens: dict[str, int]
) -> NewNames:
    """Return what a tokenizer lacks to decode the added tokens of a model; it may have some.

    Args:
        tokenizer: of the model, or None.
        first: id of the first added token.
        added_tokens: their number by modality, in the order of their ids.

    Raises:
        TypeError: it is no tokenizer.
        ValueError: its ids cannot match those of the model.
    """
    if tokenizer is None:
        return NewNames(None, [])
    check_tokenizer(tokenizer)
    names, stop = {}, first
    for modality, count in added_tokens.items():
        names |= {name: stop + i for i, name in enumerate(_named(modality, range(count)))}
        stop += count
    vocabulary = tokenizer.get_vocab()
    missing = {name: i for name, i in names.items() if vocabulary.get(name) != i}
    return _names_after(tokenizer, min(missing.values(), default=first), list(missing))


def _named(modality: str, ids: range) -> list[str]:
    return [f"<{modality}_{i}>" for i in range(len(ids))]


def _names_after(tokenizer: PreTrainedTokenizerBase | None, first: int, new: list[str]) -> NewNames:
    """Return names whose ids begin at ``first``, after fillers for the unused ids before."""
    if tokenizer is None or not new:
        return NewNames(tokenizer, [])
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary.values(), default=-1)
    if last >= first:
        raise ValueError(
            f"the tokenizer has ids up to {last} but the model's table {first} rows: "
            "resize the model's embeddings before patching. Placeholders (add_placeholders) are "
            "given to the tokenizer after these tokens"
        )
    if last >= len(vocabulary):
        raise ValueError(
            f"the tokenizer has {len(vocabulary)} tokens but ids up to {last}: added tokens would "
            "fall into the gaps"
        )
    names = [*(f"<unused_{i}>" for i in range(last + 1, first)), *new]
    if clash := set(names) & set(vocabulary):
        raise ValueError(f"the tokenizer has tokens of these names already: {sorted(clash)[:5]}")
    return NewNames(tokenizer, names)
