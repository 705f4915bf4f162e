"""Outcome of patch_model on a family of models, tried on its tiny model."""

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.families import FAMILIES, VOCAB, inputs_of, make_family
from support.model_zoo import assert_same_snapshot, randomise, snapshot, token_ids
from torch import Tensor, nn
from torch.func import functional_call

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models.projections import find_projections
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms

TARGETS = ("experts", "attention", "router")
LENGTH = 12
STEPS = 3
NUM_TOKENS = 3
FORWARD, GRADIENT = 1e-5, 1e-4  # largest relative RMS in float32
# The first sequence is text; the second is text, then an image.
MODALITY_IDS = torch.tensor([[0] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)])
IMAGE = MODALITY_IDS == 1


@dataclass
class Outcome:
    """Findings about a family.

    Attributes:
        backend: None: the default one; "reference", if only that has the layout of the experts.
        refused: why each of "experts", "attention", "router", "tokens" and "extension" is refused,
            if it is. A model whose experts are refused gets none of these.
        layers: for each target, how many decoder layers got adapters.
        num_layers: of the tiny model.
        faults: what was accepted, but is wrong.
        cache_is_exact: False: transformers' own tokens differ with its cache.
        padding_is_inert: False: transformers' own logits depend on what padding holds.
    """

    backend: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    num_layers: int = 0
    faults: list[str] = field(default_factory=list)
    cache_is_exact: bool = True
    padding_is_inert: bool = True

    @property
    def supported(self) -> bool:
        return "experts" not in self.refused

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)


@functools.cache
def try_family(name: str) -> Outcome:
    """Try everything on a family's tiny model."""
    outcome, model = Outcome(), make_family(name)
    ids = token_ids(2, LENGTH, vocab=VOCAB)
    inputs = inputs_of(name, model, ids)
    plain = _logits(model, inputs)
    assert FAMILIES[name].experts in {type(module).__name__ for module in model.modules()}
    assert plain.isfinite().all() and plain.std() > 0.05
    for target in TARGETS:
        _try_target(model, target, outcome)
    if not outcome.supported:
        _try_reference(model, outcome)
    if outcome.supported:
        targets = tuple(target for target in TARGETS if target not in outcome.refused)
        patched = patch_model(model, _config(outcome, *targets))
        _count_layers(patched, targets, outcome)
        _check_forward(patched, inputs, plain, outcome)
        _check_padding(name, patched, ids, outcome)
        _check_against_autograd(name, patched, ids, outcome)
        _check_recompute(name, patched, ids, outcome)
        if FAMILIES[name].takes_ids:
            _check_generation(name, patched, ids, outcome)
        _check_tokens(name, patched, ids, outcome)
        _check_files(name, patched, inputs, outcome)
        patched.unpatch()
        _check_extension(name, ids, outcome)
    outcome.require(torch.equal(_logits(model, inputs), plain), "the model is not as it was")
    return outcome


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict, **settings) -> Tensor:
    torch.manual_seed(0)  # a model may draw numbers (diffusion)
    return model(**inputs, **settings).logits


def _refusal(call: Callable, model: nn.Module) -> str | None:
    """Return why a call is refused, before any change; None: it is not."""
    before = snapshot(model)
    try:
        call()
        return None
    except (ValueError, NotImplementedError) as error:
        reason = str(error)
    assert_same_snapshot(snapshot(model), before)
    assert reason and "\n" not in reason, reason
    return reason


def _config(outcome: Outcome, *targets: str) -> ModalityLoraConfig:
    return ModalityLoraConfig(r=4, lora_alpha=4, target_modules=targets, backend=outcome.backend)


def _try_reference(model: nn.Module, outcome: Outcome) -> None:
    """Try the backend that has every layout, where the default one lacks it."""
    trial = Outcome(backend="reference")
    for target in TARGETS:
        _try_target(model, target, trial)
    if trial.supported:
        outcome.backend, outcome.refused = trial.backend, trial.refused


def _try_target(model: nn.Module, target: str, outcome: Outcome) -> None:
    config = _config(outcome, target)
    before = snapshot(model)
    if reason := _refusal(lambda: patch_model(model, config).unpatch(), model):
        outcome.refused[target] = reason
    assert_same_snapshot(snapshot(model), before)


def _count_layers(patched, targets: Iterable[str], outcome: Outcome) -> None:
    outcome.num_layers = len(patched.parts)
    for target in targets:
        config = ModalityLoraConfig(target_modules=(target,))
        found = find_projections(patched.model, config, patched.parts)
        outcome.layers[target] = len({each.layer_name for each in found})


def _require_text(actual: Tensor, expected: Tensor, what: str, outcome: Outcome) -> None:
    """Require the same bits of text; from the reference, whose GEMMs are torch's, close values."""
    actual, expected = (each[..., :VOCAB][~IMAGE] for each in (actual, expected))
    same = torch.equal(actual, expected)
    near = outcome.backend == "reference" and relative_rms(actual, expected) < FORWARD
    outcome.require(same or near, what)


def _check_forward(patched, inputs: dict, plain: Tensor, outcome: Outcome) -> None:
    """Compare logits without adapters, with adapters that start at zero, and with random ones."""
    model, settings = patched.model, {"modality_ids": MODALITY_IDS}
    start = _logits(model, inputs, **settings)
    outcome.require(relative_rms(start, plain) < FORWARD, "adapters of zero change the logits")
    randomise(patched)
    changed = _logits(model, inputs, **settings)
    outcome.require(changed.isfinite().all().item(), "logits are not finite")
    _require_text(changed, start, "logits of text changed", outcome)
    differs = (changed != start).any(-1)[IMAGE].all().item()
    outcome.require(differs, "adapters do not reach the logits of images")
    with patched.adapters_disabled():
        off = _logits(model, inputs, **settings)
    outcome.require(relative_rms(off, plain) < FORWARD, "disabled adapters change the logits")


def _check_padding(name: str, patched, ids: Tensor, outcome: Outcome) -> None:
    """Compare real tokens behind padding with those of the plain model."""
    plain, real = make_family(name), torch.ones_like(ids)
    real[0, :3] = 0
    expected, other, actual = (
        _logits(model, inputs_of(name, model, each), attention_mask=real)[real == 1]
        for model, each in ((plain, ids), (plain, ids * real), (patched.model, ids))
    )
    outcome.padding_is_inert = relative_rms(other, expected) < FORWARD
    same = relative_rms(actual, expected) < FORWARD
    outcome.require(same or not outcome.padding_is_inert, "padding changes the logits")


def _check_against_autograd(name: str, patched, ids: Tensor, outcome: Outcome) -> None:
    """Compare with the class's own code, run with merged weights on the rows of images."""
    plain, pairs = make_family(name), []
    names = {module: path for path, module in patched.model.named_modules()}
    weights = {}
    for projection in patched.projections:
        pair = [p.detach().clone().requires_grad_() for p in projection.lora.parameters()]
        pairs += zip((projection.lora.lora_A, projection.lora.lora_B), pair, strict=True)
        weight = getattr(plain.get_submodule(names[projection.module]), projection.parameter)
        merged = weight.detach() + _update(*pair, projection.lora.scaling, weight.shape)
        weights.setdefault(names[projection.module], {})[projection.parameter] = merged
    plain.requires_grad_(False)
    for path, merged in weights.items():
        plain.get_submodule(path).register_forward_hook(_OnImages(merged), with_kwargs=True)
    trained = [ours for ours, _ in pairs]
    logits, actual = _gradients(name, patched.model, ids, trained, modality_ids=MODALITY_IDS)
    expected_logits, expected = _gradients(name, plain, ids, [theirs for _, theirs in pairs])
    outcome.require(relative_rms(logits, expected_logits) < FORWARD, "wrong logits with adapters")
    for ours, theirs in zip(actual[:-1], expected[:-1], strict=True):
        outcome.require(bool(theirs.any()), "an adapter has no part in the logits")
        outcome.require(relative_rms(ours, theirs) < GRADIENT, "a wrong gradient of an adapter")
    outcome.require(relative_rms(actual[-1], expected[-1]) < GRADIENT, "a wrong gradient of inputs")


def _check_recompute(name: str, patched, ids: Tensor, outcome: Outcome) -> None:
    """Compare gradients with and without activation checkpointing, in training mode."""
    model = patched.model
    if not model.supports_gradient_checkpointing:
        return
    trained, settings = list(patched.trainable_parameters()), {"modality_ids": MODALITY_IDS}
    model.train()
    _, expected = _gradients(name, model, ids, trained, use_cache=False, **settings)
    model.activation_checkpointing_enable()
    _, actual = _gradients(name, model, ids, trained, use_cache=False, **settings)
    model.activation_checkpointing_disable()
    model.eval()
    same = all(
        relative_rms(ours, theirs) < GRADIENT for ours, theirs in zip(actual, expected, strict=True)
    )
    outcome.require(same, "activation checkpointing changes the gradients")


def _update(a: Tensor, b: Tensor, scaling: Tensor, shape: torch.Size) -> Tensor:
    """Return the low-rank update of the first modality in the layout of its weight."""
    update = scaling[0].to(a.dtype) * b[0] @ a[0]
    return update if update.shape == shape else update.mT


class _OnImages:
    """A forward hook that gives rows of images the output of merged weights."""

    def __init__(self, merged: dict[str, Tensor]):
        self.merged, self.busy = merged, False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        if self.busy:
            return output
        self.busy = True
        changed = functional_call(module, self.merged, args, kwargs)
        self.busy = False
        if isinstance(output, Tensor):
            return self._pick(changed, output)
        return type(output)(map(self._pick, changed, output))

    @staticmethod
    def _pick(changed: Tensor, output: Tensor) -> Tensor:
        # Linear layers of latent attention see one head that all share.
        for rows in (IMAGE, IMAGE[:, None], IMAGE.flatten()):
            if output.shape[: rows.ndim] == rows.shape:
                rows = rows.reshape(*rows.shape, *[1] * (output.ndim - rows.ndim))
                return torch.where(rows, changed, output)
        raise AssertionError(f"where are the rows in {tuple(output.shape)}?")


def _gradients(
    name: str, model: nn.Module, ids: Tensor, trained: list[Tensor], **settings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return logits, and gradients of parameters and of the embedded ids."""
    embedded = []

    def keep(module, args, output):
        output = output if output.requires_grad else output.detach().requires_grad_()
        embedded.append(output)
        return output

    hook = model.get_input_embeddings().register_forward_hook(keep)
    torch.manual_seed(0)
    logits = model(**inputs_of(name, model, ids), **settings).logits
    hook.remove()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return logits, torch.autograd.grad((logits * weight).sum(), [*trained, embedded[0]])


@torch.no_grad()
def _whole(model: nn.Module, ids: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids with the tokens that follow, and their logits, by a forward of all ids each."""
    steps = []
    for _ in range(STEPS):
        given = {name: _extended(value, ids.shape[1]) for name, value in given.items()}
        steps.append(model(ids, use_cache=False, **given).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, torch.stack(steps)


def _extended(modality_ids: Tensor, length: int) -> Tensor:
    return nn.functional.pad(modality_ids, (0, length - modality_ids.shape[1]))


def _generated(model: nn.Module, ids: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by ``generate``, with a cache."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **given,
    )
    return output.sequences, torch.stack(output.logits)


def _same_tokens(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    same = torch.equal(actual[0], expected[0])
    return same and relative_rms(actual[1], expected[1]) < GRADIENT


def _check_generation(name: str, patched, ids: Tensor, outcome: Outcome) -> None:
    """Compare generated tokens with those of the plain model, and with those of whole forwards."""
    model, plain = patched.model, make_family(name)
    expected = _generated(plain, ids)
    outcome.require(_same_tokens(_generated(model, ids), expected), "generate gives other text")
    outcome.cache_is_exact = _same_tokens(expected, _whole(plain, ids))
    if outcome.cache_is_exact:
        given = {"modality_ids": MODALITY_IDS}
        same = _same_tokens(_generated(model, ids, **given), _whole(model, ids, **given))
        outcome.require(same, "a cache changes the tokens after an image")


def _check_tokens(name: str, patched, ids: Tensor, outcome: Outcome) -> None:
    """Add tokens: text keeps its bits, and the added rows get a gradient."""
    model = patched.model
    if not FAMILIES[name].takes_ids:
        return
    before = _logits(model, {"input_ids": ids}, modality_ids=torch.zeros_like(ids))
    reason = _refusal(lambda: add_modality_tokens(model, "image", NUM_TOKENS), model)
    if reason:
        outcome.refused["tokens"] = reason
        return
    image = VOCAB + ids % NUM_TOKENS
    ids = torch.where(IMAGE, image, ids)
    try:
        # A convolution has other kernels where a gradient is asked for: text is compared without.
        text = _logits(model, {"input_ids": ids})
        _require_text(text, before, "added tokens change text", outcome)
        logits = model(ids).logits
    except (IndexError, RuntimeError) as error:
        outcome.faults.append(f"added tokens do not run: {type(error).__name__}: {error}")
        return
    outcome.require(logits.shape[-1] == before.shape[-1] + NUM_TOKENS, "no logits of added tokens")
    rows = [p for n, p in patched.named_trainable_parameters() if "lora" not in n]
    gradients = torch.autograd.grad(logits.square().sum(), rows)
    outcome.require(bool(rows) and all(map(torch.any, gradients)), "an added row does not train")


def _check_files(name: str, patched, inputs: dict, outcome: Outcome) -> None:
    """Load what was saved on the plain model: the same bits. Checkpoints keep added names."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "save_pretrained of a patched model")
        patched.model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    kept = (
        path in saved and torch.equal(saved[path], parameter)
        for path, parameter in patched.named_trainable_parameters()
    )
    outcome.require(all(kept), "save_pretrained renames or changes what was added")
    with tempfile.TemporaryDirectory() as folder:
        patched.save_adapter(folder)
        config = ModalityLoraConfig.from_adapter(folder)
        config = dataclasses.replace(config, backend=outcome.backend)
        loaded = patch_model(make_family(name), config)
        loaded.load_adapter(folder)
    expected, actual = (
        _logits(each.model, inputs, modality_ids=MODALITY_IDS) for each in (patched, loaded)
    )
    outcome.require(torch.equal(actual, expected), "a loaded adapter gives other logits")


def _check_extension(name: str, ids: Tensor, outcome: Outcome) -> None:
    """Add experts: text keeps its bits, images reach them, and they train."""
    model = make_family(name)
    inputs, extender = inputs_of(name, model, ids), ExpertExtender(model, backend=outcome.backend)
    before = _logits(model, inputs, modality_ids=MODALITY_IDS)
    reason = _refusal(lambda: extender.extend("all", 2, init=0), model)
    if reason:
        outcome.refused["extension"] = reason
        return
    patched = extender.patched
    randomise(patched, scale=1.0)
    with torch.no_grad():  # whatever a row is, it gives one of two opposite columns a large logit
        for name, columns in patched.named_trainable_parameters():
            if name.endswith("router_columns"):
                columns[1] = -columns[0]
    logits = model(**inputs, modality_ids=MODALITY_IDS).logits
    _require_text(logits, before, "added experts change text", outcome)
    gradients = torch.autograd.grad(logits.square().sum(), list(patched.trainable_parameters()))
    outcome.require(all(map(torch.any, gradients)), "an added expert does not train")
    with extender.disabled():
        off = _logits(model, inputs, modality_ids=MODALITY_IDS)
    outcome.require(relative_rms(off, before) < FORWARD, "disabled experts change the logits")
