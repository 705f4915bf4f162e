"""Images as tokens: a patch codebook, the layout of a sequence, and sampling from a model.

``sequence`` and ``tokenizer`` need nothing beyond torch (fitting a codebook needs scikit-learn);
``generation`` needs transformers.
"""

from moe_kernels.imaging.generation import ImageTokensProcessor, generate_images
from moe_kernels.imaging.metrics import count_distinct, mean_pairwise_distance, nearest_distances
from moe_kernels.imaging.plots import SampleRow, plot_samples
from moe_kernels.imaging.sequence import (
    IGNORE_INDEX,
    CaptionedImages,
    ImageCollator,
    ImageVocabulary,
    image_prompt,
    image_sequence,
)
from moe_kernels.imaging.tokenizer import ImageTokenizer, PatchTokenizer

__all__ = [
    "IGNORE_INDEX",
    "CaptionedImages",
    "ImageCollator",
    "ImageTokenizer",
    "ImageTokensProcessor",
    "ImageVocabulary",
    "PatchTokenizer",
    "SampleRow",
    "count_distinct",
    "generate_images",
    "image_prompt",
    "image_sequence",
    "mean_pairwise_distance",
    "nearest_distances",
    "plot_samples",
]
