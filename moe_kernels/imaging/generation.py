"""Generation of pictures from captions through ``model.generate``."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_kernels import arguments, extras
from moe_kernels.imaging.pixels import to_pil
from moe_kernels.imaging.processors import (
    ImageGuidanceProcessor,
    ImageTokensProcessor,
    unwrapped,
)
from moe_kernels.imaging.sequence import (
    ImageCollator,
    ImageVocabulary,
    caption_ids,
    image_prompt,
    padding_id,
)
from moe_kernels.imaging.tokenizer import ImageTokenizer
from moe_kernels.models.handle import get_patched
from moe_kernels.models.offload import device_of_model
from moe_kernels.modes import ending_with, evaluating
from moe_kernels.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image

_TEMPERATURES = (1e-6, 1e6)  # beyond them, scores become infinite or equal
# Torch's generators, which a seed sets, and the model's settings are those of all threads.
_ONE_AT_A_TIME = threading.RLock()


def generate_images(
    model: PreTrainedModel,
    captions: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    image_tokenizer: ImageTokenizer,
    vocabulary: ImageVocabulary | None = None,
    guidance_scale: float = 1.0,
    empty_caption: str = "",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 32,
    seed: int | None = None,
    progress: bool = False,
) -> list[Image]:
    """Generate one picture for each caption.

    Args:
        model: a model with image tokens; patched, unless ``vocabulary`` is passed.
        captions: texts. They are tokenised by :func:`caption_ids`, which training must use too.
        tokenizer: the model's transformers tokenizer.
        image_tokenizer: the tokenizer whose codes the model was trained on.
        vocabulary: ids of the image tokens; default: those of modality "image" in the patched
            model.
        guidance_scale: w of classifier-free guidance. 1 switches it off; otherwise every step costs
            two forwards.
        empty_caption: caption of guidance's unconditional branch, the one that training used with
            ``caption_dropout``.
        temperature, top_k, top_p, batch_size, seed, progress: see :func:`generate_image_codes`.

    Returns:
        PIL pictures of mode "L" or "RGB", in the order of the captions.

    Raises:
        ImportError: pillow is not installed.
        ValueError: the model has no image tokens, their number differs from the image tokenizer's,
            a caption contains image tokens or is too long, the tokenizer has no token to pad with,
            or a setting is out of range.
        TypeError: ``captions`` is a single string, or holds something else than strings, or a
            tokenizer is none.

    Example:
        >>> import torch
        >>> from moe_kernels import add_modality_tokens, patch_model
        >>> from moe_kernels.imaging import ImageVocabulary, VQTokenizer, generate_images
        >>> from moe_kernels.testing import tiny_model, tiny_tokenizer
        >>> images = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
        >>> codes = VQTokenizer.fit(images, num_codes=8, width=16, steps=2, progress=False)
        >>> model, tokenizer = tiny_model(), tiny_tokenizer()
        >>> patched = patch_model(model)
        >>> ids = add_modality_tokens(model, "image", ImageVocabulary.size(8))
        >>> generate_images(
        ...     model, ["a red apple"], tokenizer=tokenizer, image_tokenizer=codes, seed=0
        ... )
        [<PIL.Image.Image image mode=RGB size=8x8 at ...>]
    """
    extras.load("PIL", "generate_images")
    if isinstance(captions, str):
        raise TypeError("captions must be a list of strings; got one string")
    _check_tokenizers(tokenizer, image_tokenizer)
    vocabulary = vocabulary or _vocabulary_of(model)
    if vocabulary.num_codes != image_tokenizer.num_codes:
        raise ValueError(
            f"the model has tokens for {vocabulary.num_codes} codes, but the image tokenizer has "
            f"{image_tokenizer.num_codes} codes: pass the image tokenizer that the model was "
            "trained with"
        )
    codes = generate_image_codes(
        model,
        [caption_ids(tokenizer, caption) for caption in captions],
        vocabulary,
        image_tokenizer.tokens_per_image,
        pad_token_id=padding_id(tokenizer),
        guidance_scale=guidance_scale,
        empty_caption=caption_ids(tokenizer, empty_caption),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return to_pil(image_tokenizer.decode(codes))


@torch.no_grad()
def generate_image_codes(
    model: PreTrainedModel,
    caption_ids: Sequence[Sequence[int]],
    vocabulary: ImageVocabulary,
    tokens_per_image: int,
    *,
    pad_token_id: int,
    guidance_scale: float = 1.0,
    empty_caption: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 32,
    seed: int | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Sample the codes of one picture for each caption, with the key-value cache.

    The model's ``generation_config`` (a repetition penalty, say) is meant for text and is ignored.
    Calls of several threads run one after another, since all share torch's generators. Text that
    another thread generates meanwhile needs a ``generation_config`` of its own.

    Args:
        model: a model with the vocabulary's tokens.
        caption_ids: token ids of each caption.
        vocabulary: ids of the image tokens.
        tokens_per_image: number of codes in a picture.
        pad_token_id: token for the masked padding on the left of shorter captions.
        guidance_scale: w of :class:`ImageGuidanceProcessor`; 1 switches guidance off.
        empty_caption: token ids of guidance's unconditional branch.
        temperature: temperature of the softmax.
        top_k: sample from this many most probable codes; 0: from all codes; 1: greedy.
        top_p: sample from the most probable codes whose probabilities add up to this.
        batch_size: number of pictures generated at a time.
        seed: seed of the samples, which leaves the global generators as they were; None: sample
            from the global generators.
        progress: show a bar or, where there is no terminal, a line every half minute.

    Returns:
        Codes, (N, tokens_per_image) int64, on the CPU.

    Raises:
        ValueError: a caption contains image tokens, a caption and a picture take more positions
            than the model has, a setting is out of range, or the model has no weights.
    """
    tokens_per_image, pad_token_id = arguments.integers(
        tokens_per_image=tokens_per_image, pad_token_id=pad_token_id
    )
    _check_settings(temperature, top_k, top_p, batch_size, seed)
    prompts = [image_prompt(caption, vocabulary) for caption in caption_ids]
    _check_weights(model)
    guided = [image_prompt(empty_caption, vocabulary)] if guidance_scale != 1 else []
    # The last code is not read by the model, so it needs no position.
    longest = max(map(len, prompts + guided), default=0) + tokens_per_image - 1
    check_positions(model, longest)
    # transformers takes numbers of Python alone.
    sampling = {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}
    collate = ImageCollator(pad_token_id)
    guidance = ImageGuidanceProcessor(
        model, vocabulary, tokens_per_image, guidance_scale, empty_caption=empty_caption
    )
    processors = LogitsProcessorList([guidance, ImageTokensProcessor(vocabulary, tokens_per_image)])
    batches, device = [], device_of_model(model)
    shown = bar(total=len(prompts), desc="drawing", unit="images", shown=progress)
    with _ONE_AT_A_TIME, _generating(model), _seeded(device, seed), shown:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            batch = collate([{"input_ids": torch.tensor(ids, device="cpu")} for ids in part])
            output = model.generate(
                **{name: tensor.to(device) for name, tensor in batch.items()},
                **sampling,
                do_sample=True,
                max_new_tokens=tokens_per_image,
                suppress_tokens=[],
                pad_token_id=pad_token_id,
                logits_processor=processors,
            )
            batches.append(vocabulary.codes_of(output[:, -tokens_per_image:].cpu()))
            shown.update(len(part))
    none = torch.empty(0, tokens_per_image, dtype=torch.long, device="cpu")
    return torch.cat([none, *batches])


def _check_tokenizers(tokenizer: Any, image_tokenizer: Any) -> None:
    """Raise TypeError unless one can be called with text, and the other decodes codes."""
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer must be a tokenizer of transformers; got {type(tokenizer).__name__}: load "
            "it by AutoTokenizer.from_pretrained"
        )
    if not all(hasattr(image_tokenizer, name) for name in ("decode", "num_codes")):
        raise TypeError(
            "image_tokenizer must be an image tokenizer, with decode and num_codes; got "
            f"{type(image_tokenizer).__name__}: load it by load_image_tokenizer(folder)"
        )


def _vocabulary_of(model: PreTrainedModel) -> ImageVocabulary:
    token_ids = get_patched(model).modality_token_ids("image")
    if not token_ids:
        raise ValueError(
            'the model has no tokens of modality "image": call add_modality_tokens or load_adapter'
        )
    return ImageVocabulary.from_token_ids(token_ids)


def _check_settings(
    temperature: float, top_k: int, top_p: float, batch_size: int, seed: int | None
) -> None:
    temperature, top_p = arguments.floats(temperature=temperature, top_p=top_p)
    low, high = _TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(
            f"temperature must be above 0 (top_k=1 is greedy), and lie in {low:g}..{high:g}; got "
            f"{temperature}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")
    integers = {"top_k": (top_k, 0), "batch_size": (batch_size, 1), "seed": (seed or 0, 0)}
    for name, (value, least) in integers.items():
        if (number := arguments.as_integer(value)) is None or not least <= number < 2**63:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")


def _check_weights(model: PreTrainedModel) -> None:
    if device_of_model(model).type == "meta":
        raise ValueError("the model is on the meta device, where it has no weights: load it first")


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError unless a model has positions for so many tokens of caption and picture."""
    positions = getattr(unwrapped(model).config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"the longest caption and a picture take {length:,} positions, more than the model's "
            f"{positions:,}: shorten the caption"
        )


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode with a default generation config and without router logits.

    Models trained with a balance loss return router logits. transformers would then compute that
    loss at every forward, and fail where the mask is longer than the new tokens.
    """
    inner = unwrapped(model)
    settings = inner.generation_config
    router_logits = getattr(inner.config, "output_router_logits", None)

    def restore() -> None:
        if router_logits:
            inner.config.output_router_logits = router_logits
        inner.generation_config = settings

    with ending_with(restore), evaluating(model):
        inner.generation_config = GenerationConfig()
        if router_logits:
            inner.config.output_router_logits = False
        yield


@contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Seed the generators and restore them afterwards; None: leave them alone."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, enabled=seed is not None, device_type=device.type):
        if seed is not None:
            torch.manual_seed(seed)
        yield
