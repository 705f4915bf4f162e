"""Pictures of a study: those for training, for choosing learning rates and for reporting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from moe_kernels import imaging
from moe_kernels.programs.shared.pictures import CaptionedPictures, TokenizedPictures
from moe_kernels.programs.shared.text_to_image import Judge


class PictureSplits(ABC):
    """Three splits of a data set, as codes of one image tokenizer, and the judge of drawings."""

    seed: int
    num_codes: int
    patch_size: int

    @abstractmethod
    def split(self) -> tuple[CaptionedPictures, CaptionedPictures, CaptionedPictures]:
        """Return the pictures for training, choosing and reporting."""

    @cached_property
    def _split(self) -> tuple[CaptionedPictures, CaptionedPictures, CaptionedPictures]:
        return self.split()

    @cached_property
    def tokenizer(self) -> imaging.PatchTokenizer:
        return imaging.PatchTokenizer.fit(
            self._split[0].images, num_codes=self.num_codes, patch_size=self.patch_size,
            seed=self.seed,
        )  # fmt: skip

    @cached_property
    def train(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.tokenizer, self._split[0])

    @cached_property
    def choice(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.tokenizer, self._split[1])

    @cached_property
    def test(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.tokenizer, self._split[2])

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.train, self.test, self.tokenizer, self.seed)
