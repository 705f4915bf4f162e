"""``refit``: fit the experts' down_proj to the dense model by least squares, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels import arguments
from moe_kernels.conversion.whole import gated_activations
from moe_kernels.models.undo import all_or_nothing
from moe_kernels.modes import evaluating, removing_hooks
from moe_kernels.progress import bar

# Relative to the mean squared activation: it pulls the weights to those of the dense model.
_RIDGE = 0.01


@torch.no_grad()
def refit(
    moe: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    progress: bool = True,
) -> list[float]:
    """Fit the experts' down_proj of a converted model so that its layers repeat the dense ones.

    A token of a converted model lacks the neurons of the experts that it did not choose. What they
    would have added is correlated with the neurons that the token has, so other columns of
    down_proj come nearer to the dense layer. Layer after layer, with all layers before it fitted,
    W minimises

        sum over tokens |h_dense - h_moe(W)|^2 + r |W - W_0|^2

    where h are the hidden states behind the layer, so that each layer also makes up for what the
    layers before it have lost; W_0 is the weight before, and r a hundredth of the mean squared
    activation times the number of tokens. The solution is in closed form: there is no learning
    rate. Where every token chooses all experts (k = E) there is nothing to make up for: no weight
    changes.

    In memory, beside both models and a copy of all down_proj, are

    - of each token the hidden states behind the last layer done, of both models, and of one layer
      the input, the chosen experts and the gates of its experts: 3 H + k floats and k int64;
    - of each batch the masks and positions that the models give to their layers;
    - of one layer, of I neurons an expert, the matrix of (E I)^2 float64 and its factors.

    Args:
        moe: a model that :func:`dense_to_moe` returned, in float32 or float64; down_proj of its
            routed experts changes in place.
        dense: its source, on the same device; not changed. Its attention may be implemented in
            another way ("sdpa", "eager").
        batches: (B, S) int64 token ids without padding. A layer has as many unknowns a row as it
            has neurons: several times as many tokens are needed.
        progress: show a bar or, where there is no terminal, a line every half minute.

    Returns:
        For each layer |h_dense - h_moe|^2 after the fit, as a share of that before; 1.0 if k = E.

    Raises:
        TypeError: a batch is no tensor.
        ValueError: there are no batches, or the weights are in half precision.
        FloatingPointError: activations, errors or the solution are not finite; names the layer.

        After any error, Ctrl-C included, all weights are as they were before the call.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from moe_kernels.conversion import dense_to_moe, refit
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        >>> batches = [torch.randint(64, (4, 32)) for _ in range(4)]
        >>> moe = dense_to_moe(dense, 4, 3, calibration=batches)
        >>> all(share < 1 for share in refit(moe, dense, batches, progress=False))
        True
    """
    _check(moe, batches)
    layers = list(zip(moe.model.layers, dense.model.layers, strict=True))
    if all(_chooses_all(layer) for layer, _ in layers):
        return [1.0] * len(layers)
    fitted = [layer.mlp.experts.down_proj for layer, _ in layers]
    with all_or_nothing(moe, values=fitted), evaluating(moe, dense):
        entered = [_Batch(moe, dense, ids.to(moe.device)) for ids in batches]
        return [
            _refit_layer(*pair, entered, index)
            for index, pair in enumerate(
                bar(layers, desc="refitting", unit="layers", shown=progress)
            )
        ]


class _Batch:
    """Hidden states of a batch in both models, and what each model gives to its own layers.

    Masks are not exchanged: that of one implementation of attention, None say, would let another
    see the future.
    """

    def __init__(self, moe: PreTrainedModel, dense: PreTrainedModel, ids: Tensor):
        self.state, self.kwargs = _entry(moe, ids)
        self.target, self.dense_kwargs = _entry(dense, ids)
        self.visit: list[Tensor] = []  # what the experts of the present layer were given


def _chooses_all(layer: nn.Module) -> bool:
    return layer.mlp.gate.top_k == layer.mlp.experts.num_experts


def _check(moe: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    if not len(batches):
        raise ValueError("batches is empty: pass at least one batch of token ids")
    arguments.token_batches("batches", batches)
    if moe.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the converted model is in {moe.dtype}, too coarse to solve for its weights: refit in "
            "float32 (model.float()), and convert to half precision afterwards"
        )


def _entry(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the first layer's input, and for each layer its masks, positions and the like."""
    entered: list[Tensor] = []
    kwargs: list[dict[str, Any]] = []

    def keep(layer: nn.Module, args: tuple[Tensor], named: dict[str, Any]) -> None:
        entered.extend(args[: not entered])
        kwargs.append(named)

    with removing_hooks() as hooks:
        for layer in model.model.layers:
            hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        model.model(input_ids=ids, use_cache=False)  # without the head, whose logits are large
    return entered[0], kwargs


def _refit_layer(
    layer: nn.Module, dense_layer: nn.Module, batches: Sequence[_Batch], index: int
) -> float:
    """Fit one layer and move all batches behind it; return what the fit leaves of the error."""
    experts = layer.mlp.experts
    down = experts.down_proj  # (E, H, I)
    width = down.shape[0] * down.shape[2]
    gram = down.new_zeros(width, width, dtype=torch.float64)
    moment = down.new_zeros(width, down.shape[1], dtype=torch.float64)
    before = 0.0
    for batch in batches:
        batch.target = dense_layer(batch.target, **batch.dense_kwargs[index])
        with _experts_inputs(experts) as batch.visit:
            batch.state = layer(batch.state, **batch.kwargs[index])
        act = gated_activations(experts, *batch.visit)
        error = (batch.target - batch.state).flatten(0, 1)
        gram += act.T @ act
        moment += act.T @ error
        before += float(error.double().square().sum())
    change = _solution(gram, moment, index).to(down.dtype)  # (E I, H)
    solved = down + change.view(down.shape[0], down.shape[2], -1).transpose(1, 2)
    _check_finite(solved, "the solution", index)
    down.copy_(solved)
    after = 0.0
    for batch in batches:
        added = gated_activations(experts, *batch.visit) @ change
        batch.visit = []
        batch.state = batch.state + added.view_as(batch.state)
        after += float((batch.target - batch.state).double().square().sum())
    return after / before if before else 1.0


def _solution(gram: Tensor, moment: Tensor, index: int) -> Tensor:
    """Return the change of down_proj that the sums over tokens ask for; ``gram`` gets the ridge."""
    _check_finite(gram, "the sum of the activations' products", index)
    _check_finite(moment, "the error", index)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-30))
    return torch.linalg.solve(gram, moment)


def _check_finite(tensor: Tensor, quantity: str, index: int) -> None:
    if not tensor.isfinite().all():
        raise FloatingPointError(
            f"{quantity} of layer {index} (model.layers.{index}.mlp.experts) is not finite; no "
            "weight has changed. Look for NaN and inf in the weights of both models; if there are "
            "none, convert and refit in float64 (dense.double())"
        )


@contextmanager
def _experts_inputs(experts: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that holds hidden states, chosen experts and gates after a forward."""
    inputs: list[Tensor] = []
    with removing_hooks() as hooks:
        hooks.append(experts.register_forward_pre_hook(lambda _, args: inputs.extend(args)))
        yield inputs
