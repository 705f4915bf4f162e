"""Initial low-rank updates that make image rows look like text to the weight they are added to."""

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
    """Return ``lora_A`` and ``lora_B`` that map image inputs to the text inputs aligned with them.

    docs/methods_specification.md, A3. A Gromov-Wasserstein coupling assigns to each input z of an
    image token an aligned text input e. Ridge regression fits a linear map M to these pairs, and B'
    A' is the truncated SVD of M - I. With A = A' and B = weight B' / scaling, the layer's output
    for z, weight (I + B' A') z, is close to weight e. Text rows do not use the update.

    Args:
        image_inputs: (N, in) inputs of the layer at image tokens; a few hundred, because POT's
            problem includes all of them.
        text_inputs: (N', in) inputs at text tokens.
        weight: (out, in), or (E, out, in) stacked experts that share the inputs.
        r: rank. Where r exceeds the rank of M - I, the remaining rows of A start as in LoRA, and
            the remaining columns of B are zero.
        scaling: the factor by which the layer multiplies the update, ``lora_alpha / r``.
        ridge: weight of ||M - I||^2, relative to N times the mean square of an entry of the inputs.
        metric: metric of both clouds, "cosine" of centred inputs or "euclidean".
        solver: "semirelaxed", "exact" or "entropic".
        epsilon: step size of "entropic".
        max_memory: see :func:`moe_kernels.init.gromov_wasserstein_rows`.
        seed: seed of the rows of A beyond the rank of M - I.

    Returns:
        (r, in) and (out, r), or (E, out, r) for experts; float32 on the weight's device.

    Raises:
        ImportError: POT is not installed.
        ValueError: sizes do not fit, inputs are not finite, or ridge or scaling is not above 0.
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
    """Return the text input that each image input is coupled to, and the coupling.

    (N, in), (N', in) -> (N, in) float32 on the CPU. Options are those of
    :func:`moe_kernels.init.coupling.couple`.
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
    """Return weight B', float32 on the weight's device.

    weight: (out, in) or (E, out, in); up: B', (in, r).
    """
    up, stacked = up.to(weight.device), weight.detach().reshape(-1, *weight.shape[-2:])
    # One expert at a time: a float32 copy of a 16-bit stack would be twice its size.
    product = torch.stack([matrix.float() @ up for matrix in stacked])
    return product.reshape(*weight.shape[:-1], up.shape[1])


def truncated_map(
    inputs: Tensor, outputs: Tensor, r: int, *, ridge: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return A' (r, in) and B' (in, r), whose product is M - I truncated to rank r; float32.

    M is the ridge regression of the outputs (N, in) on the inputs (N, in). Its penalty pulls M
    towards I instead of 0, so that M - I is 0 in directions without inputs; otherwise it would be
    -I there and use up the rank. Then M - I = R^T K Z with R = outputs - inputs and
    K = (Z Z^T + lambda)^-1. K is (N, N), and N is often smaller than in. Two QR factorisations
    reduce the SVD to a core no larger than N.
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
    # LoRA's usual initialisation of A: with A and B both zero, neither would get a gradient.
    bound = z.shape[1] ** -0.5
    down = z.new_empty(r, z.shape[1], dtype=torch.float32)
    down.uniform_(-bound, bound, generator=generator)
    up = z.new_zeros(z.shape[1], r, dtype=torch.float32)
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
                f"{name} must be (N, {weight.shape[-1]}) to fit the weight, got "
                f"{tuple(inputs.shape)}"
            )
    if r < 1 or not scaling > 0 or not ridge > 0:
        raise ValueError(f"r, scaling and ridge must be above 0, got {r}, {scaling} and {ridge}")
