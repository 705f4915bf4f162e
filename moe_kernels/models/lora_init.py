"""Start low-rank pairs of a patched model from its layers' inputs at text and image tokens.

The method is the last part of A3 in docs/methods_specification.md; the mathematics is in
``moe_kernels.init.lora``.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.init.coupling import check_names, import_pot
from moe_kernels.init.lora import align, through, truncated_map
from moe_kernels.init.sampling import smallest_keys
from moe_kernels.layers import ModalityLora
from moe_kernels.models import sharding
from moe_kernels.models.config import ROUTER
from moe_kernels.models.handle import PatchState, get_patched
from moe_kernels.models.projections import Projection
from moe_kernels.models.undo import all_or_nothing
from moe_kernels.modes import evaluating, removing_hooks
from moe_kernels.progress import bar

# Groups of projections that read the same input, which is recorded at the first of the group.
_SHARED_INPUT = (
    ("q_proj", "q_a_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa"),
    ("q_b_proj",),
    ("o_proj", "out_proj"),
    ("gate_up_proj", "up_proj", ROUTER),
)
LORA_INITS = ("gromov_wasserstein", "permuted")


@dataclass(frozen=True)
class LoraInitDiagnostics:
    """Diagnostics of one projection's start.

    Attributes:
        gw_value: the coupling's objective on distances of mean 1; 0: isometric.
        coupling_entropy: mean entropy, in nats, of an image input's coupling to the text inputs.
        distance_before: ||Z - E|| / ||E|| of image inputs Z and the text E aligned to them.
        distance_after: ||Z (I + B'A')^T - E|| / ||E||.
    """

    gw_value: float
    coupling_entropy: float
    distance_before: float
    distance_after: float


def initialise_lora(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    modality: str = "image",
    lora_init: str = "gromov_wasserstein",
    max_tokens: int = 256,
    ridge: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
    metric: str = "cosine",
    solver: str = "semirelaxed",
    epsilon: float = 5e-3,
    max_memory: float = 8 * 2**30,
) -> dict[str, LoraInitDiagnostics]:
    """Start the low-rank pairs of a freshly patched model by Gromov-Wasserstein couplings.

    Forwards the batches, keeps a random sample of each layer's inputs at text and at image tokens,
    and starts the pair of every projection as :func:`moe_kernels.init.gromov_wasserstein_lora`
    does. All inputs are those of the model without adapters. The experts of a layer get the same
    A, as they and the router share the layer's input. ``down_proj`` keeps LoRA's own start, since
    each expert has an intermediate space of its own. Outputs of text rows keep their bits; those
    of the modality change.

    Args:
        model: patched, with the modality's tokens added and adapters untrained.
        batches: keyword arguments of the model's forward, text and image tokens in them.
        modality: the modality whose adapters to start.
        lora_init: "gromov_wasserstein", or "permuted": the aligned text in random order, a control.
        max_tokens: sample size, of text and of image tokens each.
        ridge: see :func:`moe_kernels.init.gromov_wasserstein_lora`.
        seed: of the sample, of the permutation and of ranks beyond the map's.
        progress: show a bar.
        metric: passed to :func:`moe_kernels.init.gromov_wasserstein_lora`, as are ``solver``,
            ``epsilon`` and ``max_memory``.

    Returns:
        Diagnostics by the projection's name, such as ``"model.layers.0.modality_lora.q_proj"``.

    Raises:
        ValueError: the model is not patched, a name is unknown, adapters have been trained or have
            ``lora_alpha`` 0, the batches lack two tokens of each kind, or the model is sharded.
        ImportError, RuntimeError: see :func:`moe_kernels.init.gromov_wasserstein_lora`. No adapter
            has changed after any of these.
    """
    check_names(solver, metric)
    patched = get_patched(model)
    index = patched.modality_id(modality) - 1
    sharding.check_whole(model, "initialise_lora")
    patched.check_one_adapter("initialise_lora")
    _check_settings(lora_init, max_tokens, ridge)
    import_pot()  # before the forwards, which take longest
    options = {"metric": metric, "solver": solver, "epsilon": epsilon, "max_memory": max_memory}
    readers = _readers(patched)
    for name, lora, _ in itertools.chain(*readers.values()):
        if lora.lora_B[index].any():
            raise ValueError(
                f"adapters of {modality!r} are not at their start: lora_B of {name} is not zero; "
                "patch the model anew"
            )
        if lora.scaling[index] == 0:
            raise ValueError(f"{name} has lora_alpha 0: no update can be started")
    samples = _collect(model, batches, list(readers), index + 1, max_tokens, seed)

    shuffle = torch.Generator().manual_seed(seed)
    pairs, diagnostics = [], {}
    for module, group in bar(readers.items(), desc="couplings", unit="couplings", shown=progress):
        image, text = samples[module]
        aligned, coupling = align(image, text, seed=seed, **options)
        if lora_init == "permuted":
            aligned = aligned[torch.randperm(aligned.shape[0], generator=shuffle)]
        for name, lora, projection in group:
            down, up = truncated_map(image, aligned, lora.r, ridge=ridge, seed=seed)
            pairs.append((lora, down, through(projection.weight, up) / lora.scaling[index]))
            diagnostics[name] = LoraInitDiagnostics(
                gw_value=coupling.value,
                coupling_entropy=coupling.entropy(),
                distance_before=_distance(image, aligned),
                distance_after=_distance(image + image @ down.T @ up.T, aligned),
            )
    started = [parameter for lora, _, _ in pairs for parameter in (lora.lora_A, lora.lora_B)]
    with all_or_nothing(model, values=started), torch.no_grad():
        for lora, lora_a, lora_b in pairs:
            lora.lora_A[index].copy_(lora_a)  # the same for every expert
            lora.lora_B[index].copy_(lora_b)
        return diagnostics


def _check_settings(lora_init: str, max_tokens: int, ridge: float) -> None:
    if lora_init not in LORA_INITS:
        raise ValueError(f"unknown lora_init {lora_init!r}; the inits are {', '.join(LORA_INITS)}")
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")


def _distance(inputs: Tensor, aligned: Tensor) -> float:
    return ((inputs - aligned).norm() / aligned.norm()).item()


def _readers(patched: PatchState) -> dict[nn.Module, list[tuple[str, ModalityLora, Projection]]]:
    """Map a module whose input is recorded to name, pair and projection of those that it has."""
    names = {module: name for name, module in patched.model.named_modules()}
    groups: dict[tuple, list[Projection]] = {}
    for projection in patched.projections:
        for keys in _SHARED_INPUT:
            if projection.key in keys:
                groups.setdefault((projection.layer, keys), []).append(projection)
    return {
        group[0].module: [(f"{names[p.layer]}.modality_lora.{p.key}", p.lora, p) for p in group]
        for group in groups.values()
    }


class _Sample:
    """Uniform sample of a stream of rows, in order, in constant memory.

    Every row draws a key; the rows with the smallest keys stay.
    """

    def __init__(self, size: int):
        self.size = size
        self.rows: Tensor | None = None
        self.keys = torch.empty(0)

    def add(self, rows: Tensor, keys: Tensor) -> None:
        if self.rows is not None:
            rows, keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
        kept = smallest_keys(keys, self.size)
        self.rows, self.keys = rows[kept], keys[kept]


class _Record:
    """Pre-hook that samples a module's input rows, those of text and those of one modality."""

    def __init__(self, modality_id: int, size: int, seed: int):
        self.modality_id = modality_id
        self.image, self.text = _Sample(size), _Sample(size)
        # Every layer draws the same keys, so all see the same tokens.
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        rows = args[0].detach().flatten(0, -2)
        modality_ids = module.__dict__["_modality_context"].modality_ids.flatten()
        keys = torch.rand(rows.shape[0], generator=self.generator)
        for sample, modality_id in ((self.image, self.modality_id), (self.text, 0)):
            # Only the sampled rows leave the device.
            positions = (modality_ids == modality_id).nonzero().flatten().cpu()
            positions = positions[smallest_keys(keys[positions], sample.size)]
            sample.add(rows[positions.to(rows.device)].cpu().float(), keys[positions])


def _collect(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    modules: list[nn.Module],
    modality_id: int,
    max_tokens: int,
    seed: int,
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Record each module's inputs at image and at text tokens, (up to max_tokens, in) float32."""
    records = {module: _Record(modality_id, max_tokens, seed) for module in modules}
    with removing_hooks() as hooks, evaluating(model), torch.no_grad():
        for module, record in records.items():
            hooks.append(module.register_forward_pre_hook(record))
        for batch in batches:
            model(**batch)
    for record in records.values():
        for sample, kind in ((record.image, "of the modality"), (record.text, "of text")):
            if sample.keys.numel() < 2:
                raise ValueError(
                    f"the batches have {sample.keys.numel()} tokens {kind}, at least 2 are needed"
                )
    return {module: (record.image.rows, record.text.rows) for module, record in records.items()}
