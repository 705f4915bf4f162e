"""Assignment of a feed-forward layer's neurons to experts.

Neuron j is row j of gate_proj and up_proj together with column j of down_proj. ``a_j(x)`` is its
activation, and ``|a_j(x)| * ||down_j||`` the size of its contribution to the layer's output.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.modes import evaluating, removing_hooks

_KMEANS_STEPS = 20  # labels have settled by then, or hardly change


def random_labels(num_neurons: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Return LLaMA-MoE's split: labels ``0..E-1``, each repeated, then shuffled.

    Returns:
        (num_neurons,) int64, each expert ``num_neurons / num_experts`` times.
    """
    labels = torch.arange(num_experts, device="cpu")
    labels = labels.repeat_interleave(num_neurons // num_experts)
    return labels[torch.randperm(num_neurons, generator=generator, device="cpu")]


def balanced_kmeans(features: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Cluster rows by k-means in which all clusters have the same size.

    Args:
        features: (N, F) float, N a multiple of ``num_clusters``.
        num_clusters: E.
        generator: draws the initial centres, E different rows.

    Returns:
        (N,) int64, each cluster N / E times.
    """
    first = torch.randperm(len(features), generator=generator, device="cpu")[:num_clusters]
    centres, labels = features[first], None
    for _ in range(_KMEANS_STEPS):
        before, labels = labels, _assign(torch.cdist(features, centres))
        if before is not None and torch.equal(before, labels):
            break
        one_hot = nn.functional.one_hot(labels, num_clusters).to(features.dtype)
        centres = one_hot.T @ features * (num_clusters / len(features))
    return labels


def _assign(distances: Tensor) -> Tensor:
    """Assign N / E rows to each centre, near ones first; distances: (N, E) -> labels (N,).

    It works in rounds. Every unassigned row applies to the nearest centre that has room, and every
    centre accepts the nearest of its applicants. A round assigns all remaining rows or fills at
    least one centre, so there are at most E rounds.
    """
    rows, clusters = distances.shape
    room = distances.new_full((clusters,), rows // clusters, dtype=torch.int64)
    labels = distances.new_full((rows,), -1, dtype=torch.int64)
    while (unassigned := (labels < 0).nonzero().flatten()).numel():
        open_distances = distances[unassigned].masked_fill(room == 0, torch.inf)
        nearest, choice = open_distances.min(1)
        for cluster in choice.unique().tolist():
            applicants = (choice == cluster).nonzero().flatten()
            order = nearest[applicants].argsort(stable=True)
            accepted = applicants[order[: int(room[cluster])]]
            labels[unassigned[accepted]] = cluster
            room[cluster] -= len(accepted)
    return labels


@contextlib.contextmanager
def _recorded_inputs(mlps: Sequence[nn.Module], limit: int) -> Iterator[list[list[Tensor]]]:
    kept: list[list[Tensor]] = [[] for _ in mlps]

    def keep(index: int, hidden_states: Tensor) -> None:
        room = limit - sum(map(len, kept[index]))
        kept[index].append(hidden_states.detach().flatten(0, -2)[:room].to("cpu", torch.float32))

    with removing_hooks() as hooks:
        for index, mlp in enumerate(mlps):
            hook = mlp.register_forward_pre_hook(lambda _, args, index=index: keep(index, args[0]))
            hooks.append(hook)
        yield kept


@torch.no_grad()
def mlp_inputs(
    model: PreTrainedModel, mlps: Sequence[nn.Module], batches: Sequence[Tensor], limit: int
) -> list[Tensor]:
    """Return the inputs of each feed-forward layer for the first ``limit`` tokens of the batches.

    Activations can be computed from them, and are several times as wide.

    Returns:
        For each layer (N, H) float32 on the CPU.
    """
    with evaluating(model), _recorded_inputs(mlps, limit) as kept:
        tokens = 0
        for ids in batches:
            if tokens >= limit:
                break
            model(input_ids=ids.to(model.device), use_cache=False)
            tokens += ids.numel()
    return [torch.cat(parts) for parts in kept]


def activations(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """Return the neurons' activations a(x), (N, H) -> (N, d_ff), float32 on the CPU."""
    gate, up = (p.weight.detach().to("cpu", torch.float32) for p in (mlp.gate_proj, mlp.up_proj))
    return mlp.act_fn(inputs @ gate.T) * (inputs @ up.T)


def contributions(mlp: nn.Module, acts: Tensor) -> Tensor:
    """Return each neuron's contribution |a_j| * ||down_j||, (N, d_ff) -> (N, d_ff)."""
    return acts.abs() * mlp.down_proj.weight.detach().to("cpu", torch.float32).norm(dim=0)


def activation_features(contribution: Tensor) -> Tensor:
    """Return a row of features per neuron, (N, d_ff) -> (d_ff, N).

    The squared distance of two rows is 2 - 2 corr, with the correlation of the two neurons'
    contributions over the tokens: neurons that are active on the same tokens are near. A neuron
    with constant contribution has a row of zeros.
    """
    centred = contribution.T - contribution.T.mean(1, keepdim=True)
    return nn.functional.normalize(centred, dim=1)
