"""Images as tokens: tokenizers, sequence layout, guidance, and sampling from a model.

``sequence`` and the tokenizers need torch only (and scikit-learn to fit a ``PatchTokenizer``);
``processors`` and ``generation`` need transformers.
"""

from moe_kernels.imaging.generation import generate_image_codes, generate_images
from moe_kernels.imaging.metrics import (
    count_distinct,
    mean_pairwise_distance,
    nearest_distances,
    nearest_indices,
)
from moe_kernels.imaging.patches import PatchTokenizer
from moe_kernels.imaging.pixels import to_pil
from moe_kernels.imaging.plots import SampleRow, plot_samples
from moe_kernels.imaging.processors import ImageGuidanceProcessor, ImageTokensProcessor
from moe_kernels.imaging.sequence import (
    IGNORE_INDEX,
    CaptionedImages,
    ImageCollator,
    ImageVocabulary,
    caption_ids,
    image_prompt,
    image_sequence,
    mixed_sequence,
    padding_id,
    split_images,
)
from moe_kernels.imaging.tokenizer import (
    CodebookTokenizer,
    ImageTokenizer,
    TokenizerReport,
    load_image_tokenizer,
    warn_if_collapsed,
)
from moe_kernels.imaging.vq import FittingError, VQTokenizer

__all__ = [
    "IGNORE_INDEX",
    "CaptionedImages",
    "CodebookTokenizer",
    "FittingError",
    "ImageCollator",
    "ImageGuidanceProcessor",
    "ImageTokenizer",
    "ImageTokensProcessor",
    "ImageVocabulary",
    "PatchTokenizer",
    "SampleRow",
    "TokenizerReport",
    "VQTokenizer",
    "caption_ids",
    "count_distinct",
    "generate_image_codes",
    "generate_images",
    "image_prompt",
    "image_sequence",
    "load_image_tokenizer",
    "mean_pairwise_distance",
    "mixed_sequence",
    "nearest_distances",
    "nearest_indices",
    "padding_id",
    "plot_samples",
    "split_images",
    "to_pil",
    "warn_if_collapsed",
]
