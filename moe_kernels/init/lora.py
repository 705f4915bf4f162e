"""A low-rank update that makes image rows look like text to the weight that it is added to."""

import torch
from torch import Tensor

from moe_kernels.init.coupling import Coupling, couple


def gromov_wasserstein_lora(
    image_inputs: Tensor,
    text_inputs: Tensor,
    weight: Tensor,
    r: int,
    *,
    scaling: float = 1.0,
    ridge: float = 1e-3,
    metric: str = "cosine",
    solver: str = "semirelaxed",
    epsilon: float = 5e-3,
    max_memory: float = 8 * 2**30,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """``lora_A``, ``lora_B`` with weight (I + B' A') z close to weight e, e the text aligned to z.

    docs/methods.md, A3: a Gromov-Wasserstein coupling gives each input z of an image token an
    aligned text input e; with the linear map M that ridge regression fits to these pairs, B' A' is
    the truncated SVD of M - I; A = A' and B = weight B' / scaling. Text rows do not see the update.

    Args:
        image_inputs: (N, in) inputs of the layer at image tokens; a few hundred, as POT solves for
            all of them.
        text_inputs: (N', in) inputs at text tokens.
        weight: (out, in), or (E, out, in) stacked experts that share the inputs.
        r: rank. Beyond the rank of M - I, A is as LoRA starts it, and B zero.
        scaling: what the layer multiplies the update by, ``lora_alpha / r``.
        ridge: weight of ||M - I||^2, relative to the mean square of an entry of the inputs times N.
        metric: of both clouds, "cosine" of centred inputs or "euclidean".
        solver: "semirelaxed", "exact" or "entropic".
        epsilon: step of "entropic".
        max_memory: see :func:`moe_kernels.init.gromov_wasserstein_rows`.
        seed: of the rows of A beyond the rank.

    Returns:
        (r, in) and (out, r), or (E, out, r) for experts; float32 on the weight's device.

    Raises:
        ImportError: POT is not installed.
        ValueError: sizes that do not fit, inputs that are not finite, ridge or scaling not above 0.
        RuntimeError: POT's coupling is not finite, or misses its marginals.
    """
    _check(image_inputs, text_inputs, weight, r, scaling, ridge)
    aligned, _ = align(
        image_inputs,
        text_inputs,
        metric=metric,
        solver=solver,
        epsilon=epsilon,
        max_memory=max_memory,
    )
    lora_a, up = truncated_map(image_inputs, aligned, r, ridge=ridge, seed=seed)
    return lora_a.to(weight.device), through(weight, up) / scaling


def align(
    image_inputs: Tensor, text_inputs: Tensor, *, metric: str = "cosine", **options
) -> tuple[Tensor, Coupling]:
    """(N, in), (N', in) -> (N, in) float32 on the CPU: what text each image input is coupled to.

    Options are those of :func:`moe_kernels.init.coupling.couple`.
    """
    image, text = (t.detach().to("cpu", torch.float32) for t in (image_inputs, text_inputs))
    coupling = couple(
        image,
        text,
        x_metric=metric,
        y_metric=metric,
        max_x=image.shape[0],
        max_y=text.shape[0],
        names=("image inputs", "text inputs"),
        **options,
    )
    return coupling.project(text), coupling


def through(weight: Tensor, up: Tensor) -> Tensor:
    """weight (out, in) or (E, out, in), B' (in, r) -> weight B', float32 on the weight's device."""
    up, stacked = up.to(weight.device), weight.detach().reshape(-1, *weight.shape[-2:])
    # One expert at a time: a float32 copy of all would be twice the size of the stack.
    product = torch.stack([matrix.float() @ up for matrix in stacked])
    return product.reshape(*weight.shape[:-1], up.shape[1])


def truncated_map(
    inputs: Tensor, outputs: Tensor, r: int, *, ridge: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(N, in), (N, in) -> A' (r, in), B' (in, r) float32: rank r of the ridge regression's M - I.

    The ridge pulls M towards I and not towards 0: where there are no inputs to learn from, M - I is
    then 0, and not a -I that would take up the rank. So M - I = R^T K Z with R = outputs - inputs
    and K = (Z Z^T + lambda)^-1, which is (N, N): in is often larger. Two QR factors leave the SVD
    of a core no larger than N.
    """
    z, outputs = (t.detach().to("cpu", torch.float64) for t in (inputs, outputs))
    residual = outputs - z
    gram = z @ z.T
    gram.diagonal().add_(ridge * gram.trace() / z.shape[1])
    left, core_left = torch.linalg.qr(residual.T)
    right, core_right = torch.linalg.qr(z.T)
    u, s, vh = torch.linalg.svd(core_left @ torch.linalg.solve(gram, core_right.T))
    rank = min(r, int((s > 1e-6 * s[0].clamp(min=1e-30)).sum()))
    root = s[:rank].sqrt()
    generator = torch.Generator().manual_seed(seed)
    # LoRA's own start: were both zero there, no gradient could reach either.
    bound = z.shape[1] ** -0.5
    down = torch.empty(r, z.shape[1]).uniform_(-bound, bound, generator=generator)
    up = torch.zeros(z.shape[1], r)
    down[:rank] = (root[:, None] * (vh[:rank] @ right.T)).float()
    up[:, :rank] = (left @ u[:, :rank] * root).float()
    return down, up


def _check(
    image: Tensor, text: Tensor, weight: Tensor, r: int, scaling: float, ridge: float
) -> None:
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must be (out, in) or (E, out, in), got {tuple(weight.shape)}")
    for name, inputs in (("image_inputs", image), ("text_inputs", text)):
        if inputs.ndim != 2 or inputs.shape[1] != weight.shape[-1]:
            raise ValueError(
                f"{name} must be (N, {weight.shape[-1]}) as the weight, got {tuple(inputs.shape)}"
            )
    if r < 1 or not scaling > 0 or not ridge > 0:
        raise ValueError(f"r, scaling and ridge must be above 0, got {r}, {scaling} and {ridge}")
