"""``dense_to_moe``: distribute the neurons of each feed-forward layer among experts."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_kernels import arguments
from moe_kernels.conversion import split as splits
from moe_kernels.conversion.families import Sizes, check_source, target_config

SPLITS = ("random", "clustered")
# Standard deviation of the initial router logits. The choice of experts depends only on their
# order; with a spread this small the gates of the chosen experts stay within a few tenths.
_LOGIT_STD = 0.1
# Relative to the mean squared input. Regression on few tokens per input direction needs damping.
_RIDGE = 0.01


def dense_to_moe(
    model: PreTrainedModel,
    num_experts: int,
    top_k: int,
    split: str = "random",
    *,
    shared_expert: int = 0,
    calibration: Sequence[Tensor] | None = None,
    calibration_tokens: int = 2048,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a Mixture of Experts made of the neurons of a dense model.

    The mathematics is in docs/methods_specification.md, A1. Every neuron goes to exactly one
    expert. A layer computes y = E * sum over the k chosen experts of g_i E_i(x), where the gates g
    sum to 1. With equal gates this is LLaMA-MoE's factor E/k for each expert. The factor E is
    folded into down_proj. With ``top_k == num_experts`` the layer equals the dense layer up to
    rounding (gates are float32 in any dtype).

    The router is zero if ``top_k == num_experts``. Otherwise its logits are small, so that the
    gates are nearly equal. With ``calibration`` the logits predict the logarithm of the norm of
    each expert's output (ridge regression on the layer's input); without it they are random. Heal
    the model afterwards (:func:`heal`).

    Llama and Mistral become Mixtral, or Qwen2-MoE with a shared expert. Qwen2 becomes Qwen2-MoE and
    Qwen3 becomes Qwen3-MoE. No dense model becomes OLMoE, whose attention normalises q and k over
    all heads.

    Args:
        model: a dense causal language model of one of these classes; it is not changed.
        num_experts: E, at least 2; must divide ``intermediate_size - shared_expert``.
        top_k: number of experts per token, 1..E.
        split: "random" (LLaMA-MoE: shuffled labels), or "clustered": neurons that are active on the
            same tokens of ``calibration`` share an expert (k-means with equal sizes).
        shared_expert: number of neurons, the most active ones, in an expert that every token uses;
            0: no such expert.
        calibration: batches of (B, S) int64 token ids without padding; needed by "clustered" and
            by a shared expert.
        calibration_tokens: maximal number of tokens used, from the first batch on. The inputs of
            all layers are kept in memory: layers x calibration_tokens x H floats.
        seed: seed of the split, the clustering and the router.

    Returns:
        A new model with the source's dtype, device, mode and generation settings.

    Raises:
        TypeError: ``model`` is not a plain transformers model, a size no integer, or a batch of
            ``calibration`` no tensor.
        ValueError: sizes do not divide, top_k is out of range, the split is unknown, calibration
            data are missing; or the model is a Mixture of Experts already, is quantised, or has a
            feature that no Mixture-of-Experts class has. Raised before any work.
    """
    check_source(model)
    sizes = _check_sizes(model.config.intermediate_size, num_experts, top_k, shared_expert)
    _check_split(split, shared_expert, calibration, calibration_tokens)
    config = target_config(model, sizes)
    mlps = [layer.mlp for layer in model.model.layers]
    inputs: list[Tensor | None] = [None] * len(mlps)
    if calibration is not None:
        inputs = splits.mlp_inputs(model, mlps, calibration, calibration_tokens)
    generator = torch.Generator().manual_seed(seed)
    state = {name: t for name, t in model.state_dict().items() if ".mlp." not in name}
    for index, mlp in enumerate(mlps):
        converted = _convert_mlp(mlp, inputs[index], sizes, split, generator)
        if config.model_type == "qwen2_moe":
            converted["shared_expert_gate.weight"] = _on_cpu(torch.zeros, 1, config.hidden_size)
        else:
            converted = {k: t for k, t in converted.items() if not k.startswith("shared_expert")}
        state |= {f"model.layers.{index}.mlp.{name}": t for name, t in converted.items()}
    return _build(model, config, state)


def _check_sizes(d_ff: int, num_experts: int, top_k: int, shared_expert: int) -> Sizes:
    num_experts, top_k, shared = arguments.integers(
        num_experts=num_experts, top_k=top_k, shared_expert=shared_expert
    )
    if num_experts < 2:
        raise ValueError(f"num_experts must be at least 2; got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..{num_experts} (num_experts); got {top_k}")
    if not 0 <= shared < d_ff:
        raise ValueError(f"shared_expert must be in 0..{d_ff - 1} (neurons); got {shared}")
    routed = d_ff - shared
    if routed % num_experts:
        divisors = [e for e in range(2, min(routed, 128) + 1) if routed % e == 0]
        raise ValueError(
            f"{num_experts} experts do not divide the {routed} neurons of a layer "
            f"(intermediate_size {d_ff}, shared_expert {shared}); up to 128, these do: {divisors}"
        )
    return Sizes(num_experts, top_k, routed // num_experts, shared)


def _check_split(
    split: str, shared: int, calibration: Sequence[Tensor] | None, calibration_tokens: int
) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
    if calibration is None:
        for needs_data, option in (
            (split == "clustered", "split='clustered'"),
            (shared, "a shared expert"),
        ):
            if needs_data:
                raise ValueError(f"{option} needs calibration data: calibration=[(B, S) token ids]")
        return
    arguments.token_batches("calibration", calibration)
    num_tokens = sum(ids.numel() for ids in calibration)
    if calibration_tokens < 1 or not num_tokens:
        raise ValueError(
            "calibration needs at least one token, and calibration_tokens must be at least 1; got "
            f"{num_tokens} tokens and calibration_tokens={calibration_tokens}"
        )


@torch.no_grad()
def _convert_mlp(
    mlp: nn.Module, inputs: Tensor | None, sizes: Sizes, split: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the tensors of one sparse layer by their names within the layer."""
    acts = None if inputs is None else splits.activations(mlp, inputs)
    neurons, shared = _distribute(mlp, acts, sizes, split, generator)
    gate, up, down = (p.weight.detach() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    # An expert (E, I, ...) has rows of gate and up, and columns of down.
    gate_up = torch.cat([gate[neurons], up[neurons]], dim=1)
    experts_down = down.T[neurons].transpose(1, 2)
    return {
        "gate.weight": _router(experts_down, neurons, inputs, acts, sizes, generator),
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": experts_down * sizes.num_experts,
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        # Times 2, since the shared expert's gate, sigmoid(0), is 1/2.
        "shared_expert.down_proj.weight": down[:, shared] * 2,
    }


def _distribute(
    mlp: nn.Module, acts: Tensor | None, sizes: Sizes, split: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return each expert's neurons (E, I) and the shared expert's (shared,), in ascending order."""
    d_ff = mlp.down_proj.in_features
    contribution = None if acts is None else splits.contributions(mlp, acts)
    shared = torch.arange(0, device="cpu")
    if sizes.shared:
        order = contribution.mean(0).argsort(descending=True, stable=True)
        shared = order[: sizes.shared].sort().values
    routed = torch.ones(d_ff, dtype=torch.bool, device="cpu").index_fill(0, shared, False)
    routed = routed.nonzero().flatten()
    if split == "random":
        labels = splits.random_labels(len(routed), sizes.num_experts, generator)
    else:
        features = splits.activation_features(contribution[:, routed])
        labels = splits.balanced_kmeans(features, sizes.num_experts, generator)
    return routed[labels.argsort(stable=True)].reshape(sizes.num_experts, sizes.expert), shared


def _router(
    experts_down: Tensor,
    neurons: Tensor,
    inputs: Tensor | None,
    acts: Tensor | None,
    sizes: Sizes,
    generator: torch.Generator,
) -> Tensor:
    """Return the router's weight, (E, H) float32.

    It is zero if all experts are chosen anyway, which makes the gates exactly equal.
    """
    num_experts, hidden = experts_down.shape[0], experts_down.shape[1]
    if sizes.top_k == num_experts:
        return _on_cpu(torch.zeros, num_experts, hidden)
    if inputs is None:
        # The layer's input is normalised: its norm is about sqrt(H).
        drawn = _on_cpu(torch.randn, num_experts, hidden, generator=generator)
        return drawn * _LOGIT_STD / math.sqrt(hidden)
    down = experts_down.to("cpu", torch.float32)
    norms = [(acts[:, chosen] @ down[e].T).norm(dim=1) for e, chosen in enumerate(neurons)]
    norms = torch.stack(norms, dim=1).double()  # (N, E) norms of the experts' outputs
    # Logarithms let every token count, instead of only the few with the largest outputs.
    size = (norms / norms.mean(1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-3).log()
    size -= size.mean(1, keepdim=True)  # the softmax ignores a term common to all experts
    x = inputs.double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ size).T
    spread = (x @ weight.T).std()
    return (weight * (_LOGIT_STD / spread.clamp_min(1e-30))).float()


def _on_cpu(make: Callable[..., Tensor], *shape: int, **options) -> Tensor:
    """Return a new float32 tensor on the CPU, whatever torch's defaults are."""
    return make(*shape, dtype=torch.float32, device="cpu", **options)


def _build(model: PreTrainedModel, config, state: dict[str, Tensor]) -> PreTrainedModel:
    """Build the target model from its configuration and tensors, with the source's settings."""
    # The constructor draws weights that are overwritten below: fork the generators so that it does
    # not advance the caller's. A Qwen2-MoE without a shared expert has empty tensors in its place,
    # about which torch warns.
    with torch.random.fork_rng(), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        moe = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    moe.load_state_dict(state)  # strict: an unexpected or missing tensor is an error
    if not _fits_grouped_mm(moe):
        moe.set_experts_implementation("eager")
    moe.generation_config = copy.deepcopy(model.generation_config)
    return moe.to(model.device).train(model.training)


def _fits_grouped_mm(moe: PreTrainedModel) -> bool:
    """Return True if transformers' grouped_mm can run the experts; warn if only their size forbids.

    The warning is needed because the choice of implementation is not stored with the model.
    """
    if moe.dtype == torch.float64:
        return False  # without a warning: float64 models are for tests, not for storing
    hidden, neurons = moe.model.layers[0].mlp.experts.down_proj.shape[1:]
    row = 16 // moe.dtype.itemsize  # grouped_mm needs rows that are multiples of 16 bytes
    if hidden % row == 0 and neurons % row == 0:
        return True
    warnings.warn(
        f"experts of {neurons} neurons in {moe.dtype} do not fit transformers' grouped_mm, which "
        f"needs multiples of {row}: the model uses model.set_experts_implementation('eager'); call "
        "it again after loading the model",
        stacklevel=4,
    )
    return False
