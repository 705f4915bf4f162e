"""``dense_to_moe``: the neurons of each feed-forward layer dealt out to experts."""

import copy
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_kernels.conversion import split as splits
from moe_kernels.conversion.families import Sizes, check_source, target_config

SPLITS = ("random", "clustered")
# The spread of router logits at the start: who is chosen follows from their order, and with a
# spread this small the gates of the chosen stay within a few tenths of each other.
_LOGIT_STD = 0.1
# Of the mean squared input: few tokens for each of the H directions need some damping.
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
    """A Mixture of Experts whose experts are the neurons of a dense model (docs/methods.md A1).

    Every neuron goes to exactly one expert. A layer computes y = E * sum over the k chosen experts
    of g_i E_i(x), where the gates g sum to 1: at equal gates LLaMA-MoE's factor E/k before each
    expert. With ``top_k == num_experts`` it *is* the dense layer, up to rounding (gates are float32
    in any dtype). The factor E is folded into down_proj.

    The router is zero for ``top_k == num_experts``. Otherwise its logits are small, so that gates
    are nearly equal: with ``calibration`` they predict the logarithm of the size of each expert's
    output (ridge regression on the layer's input), without they are random. Heal the model
    afterwards (:func:`heal`).

    Llama and Mistral become Mixtral, or Qwen2-MoE if there is a shared expert; Qwen2 becomes
    Qwen2-MoE, Qwen3 becomes Qwen3-MoE. OLMoE's attention normalises q and k over all heads, which
    none of these does.

    Args:
        model: a dense causal language model of one of these classes; it is not changed.
        num_experts: E, at least 2; must divide ``intermediate_size - shared_expert``.
        top_k: experts for each token, 1..E.
        split: "random" (LLaMA-MoE: shuffled labels), or "clustered": neurons that are active on the
            same tokens of ``calibration`` share an expert (k-means with equal sizes).
        shared_expert: so many of the most active neurons go to an expert that every token visits;
            0: there is none.
        calibration: batches of (B, S) int64 token ids without padding; needed by "clustered" and
            by a shared expert.
        calibration_tokens: so many of their tokens are used, the first ones. Layer inputs are kept
            meanwhile: layers x calibration_tokens x H floats.
        seed: of the split, the clustering and the router.

    Returns:
        A new model of the source's dtype, device, mode and generation settings.

    Raises:
        TypeError: not a plain transformers model.
        ValueError: sizes that do not divide, top_k out of range, an unknown split, missing
            calibration data, a model that is a Mixture of Experts already, is quantised, or has
            what no Mixture-of-Experts class has. Checked before any work.
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
            converted["shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
        else:
            converted = {k: t for k, t in converted.items() if not k.startswith("shared_expert")}
        state |= {f"model.layers.{index}.mlp.{name}": t for name, t in converted.items()}
    return _build(model, config, state)


def _check_sizes(d_ff: int, num_experts: int, top_k: int, shared: int) -> Sizes:
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
        for needs, what in (
            (split == "clustered", "split='clustered'"),
            (shared, "a shared expert"),
        ):
            if needs:
                raise ValueError(f"{what} needs calibration data: calibration=[(B, S) token ids]")
        return
    if calibration_tokens < 1 or not sum(ids.numel() for ids in calibration):
        raise ValueError("calibration holds no tokens, or calibration_tokens is below 1")
    for ids in calibration:
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(
                f"calibration must be (B, S) token ids; got {ids.dtype} {tuple(ids.shape)}"
            )


@torch.no_grad()
def _convert_mlp(
    mlp: nn.Module, inputs: Tensor | None, sizes: Sizes, split: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of one sparse layer, by their names in it."""
    acts = None if inputs is None else splits.activations(mlp, inputs)
    neurons, shared = _deal(mlp, acts, sizes, split, generator)
    gate, up, down = (p.weight.detach() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    # (E, I, ...): rows of gate and up, columns of down.
    gate_up = torch.cat([gate[neurons], up[neurons]], dim=1)
    experts_down = down.T[neurons].transpose(1, 2)
    return {
        "gate.weight": _router(experts_down, neurons, inputs, acts, sizes, generator),
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": experts_down * sizes.num_experts,
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        # Behind sigmoid(0) = 1/2.
        "shared_expert.down_proj.weight": down[:, shared] * 2,
    }


def _deal(
    mlp: nn.Module, acts: Tensor | None, sizes: Sizes, split: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Neurons of each expert (E, I) and of the shared one (shared,), each in ascending order."""
    d_ff = mlp.down_proj.in_features
    contribution = None if acts is None else splits.contributions(mlp, acts)
    shared = torch.arange(0)
    if sizes.shared:
        order = contribution.mean(0).argsort(descending=True, stable=True)
        shared = order[: sizes.shared].sort().values
    routed = torch.ones(d_ff, dtype=torch.bool).index_fill(0, shared, False).nonzero().flatten()
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
    """(E, H) float32; zero where all experts are chosen anyway: then gates are exactly equal."""
    num_experts, hidden = experts_down.shape[0], experts_down.shape[1]
    if sizes.top_k == num_experts:
        return torch.zeros(num_experts, hidden)
    if inputs is None:
        # A normalised input has a norm of about sqrt(H).
        return (
            torch.randn(num_experts, hidden, generator=generator) * _LOGIT_STD / math.sqrt(hidden)
        )
    down = experts_down.to("cpu", torch.float32)
    norms = [(acts[:, chosen] @ down[e].T).norm(dim=1) for e, chosen in enumerate(neurons)]
    size = torch.stack(norms, dim=1).double()  # (N, E): how large each expert's output is
    # In logs, so that every token counts, not just the few with the largest outputs.
    size = (size / size.mean(1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-3).log()
    size -= size.mean(1, keepdim=True)  # the softmax does not see what all experts share
    x = inputs.double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ size).T
    spread = (x @ weight.T).std()
    return (weight * (_LOGIT_STD / spread.clamp_min(1e-30))).float()


def _build(model: PreTrainedModel, config, state: dict[str, Tensor]) -> PreTrainedModel:
    # What is drawn here is overwritten, so nobody's random numbers are spent on it. A Qwen2-MoE
    # without a shared expert has empty tensors there, which torch warns of.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        moe = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    moe.load_state_dict(state)  # strict: a tensor that has no place is an error
    if not _fits_grouped_mm(moe):
        moe.set_experts_implementation("eager")
    moe.generation_config = copy.deepcopy(model.generation_config)
    return moe.to(model.device).train(model.training)


def _fits_grouped_mm(moe: PreTrainedModel) -> bool:
    """Whether transformers' default for experts can run; warns where loading will need a word."""
    if moe.dtype == torch.float64:
        return False  # it has none; nobody stores float64 for use
    hidden, neurons = moe.model.layers[0].mlp.experts.down_proj.shape[1:]
    row = 16 // moe.dtype.itemsize  # its rows start at multiples of 16 bytes
    if hidden % row == 0 and neurons % row == 0:
        return True
    warnings.warn(
        f"experts of {neurons} neurons in {moe.dtype} do not fit transformers' grouped_mm, which "
        f"needs multiples of {row}: this model uses model.set_experts_implementation('eager'), to "
        "be called again after loading it",
        stacklevel=4,
    )
    return False
