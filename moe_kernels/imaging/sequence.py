"""How a caption and a picture become one sequence of token ids.

    caption ids | begin-of-image | code_0 ... code_{n-1} in raster order | end-of-image

The loss falls on the codes and the end token. Begin-of-image is an added token, so the model treats
its row as the image modality: it is the row that predicts the first code, and the adapters must see
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

IGNORE_INDEX = -100
_BEGIN, _END, _FIRST_CODE = 0, 1, 2


@dataclass(frozen=True)
class ImageVocabulary:
    """Where the image's tokens lie among the model's ids; this class alone knows their order.

    first_id     begin-of-image
    first_id+1   end-of-image
    first_id+2   code 0, then the other codes
    """

    first_id: int
    num_codes: int

    def __post_init__(self):
        if self.first_id < 0 or self.num_codes < 1:
            raise ValueError(
                f"need first_id >= 0 and num_codes >= 1; got {self.first_id} and {self.num_codes}"
            )

    @classmethod
    def from_token_ids(cls, token_ids: range) -> ImageVocabulary:
        """token_ids: the range that ``add_modality_tokens`` returned."""
        return cls(token_ids.start, len(token_ids) - _FIRST_CODE)

    @staticmethod
    def size(num_codes: int) -> int:
        """How many tokens to add to a model for this many codes."""
        return num_codes + _FIRST_CODE

    @property
    def begin_id(self) -> int:
        return self.first_id + _BEGIN

    @property
    def end_id(self) -> int:
        return self.first_id + _END

    @property
    def code_ids(self) -> range:
        return range(self.first_id + _FIRST_CODE, self.first_id + _FIRST_CODE + self.num_codes)

    @property
    def token_ids(self) -> range:
        """All of them: begin, end, codes."""
        return range(self.first_id, self.first_id + self.size(self.num_codes))

    def ids_of(self, codes: torch.Tensor) -> torch.Tensor:
        """codes 0..num_codes-1, any shape -> token ids"""
        self._check_inside(codes, range(self.num_codes), "codes")
        return codes + self.code_ids.start

    def codes_of(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token ids of codes, any shape -> codes 0..num_codes-1"""
        self._check_inside(token_ids, self.code_ids, "ids of image codes")
        return token_ids - self.code_ids.start

    @staticmethod
    def _check_inside(values: torch.Tensor, allowed: range, what: str) -> None:
        if values.numel() and not (
            allowed.start <= int(values.min()) and int(values.max()) < allowed.stop
        ):
            raise ValueError(
                f"{what} must lie in {allowed.start}..{allowed.stop - 1}; "
                f"got {int(values.min())}..{int(values.max())}"
            )


def image_prompt(caption_ids: Sequence[int], vocabulary: ImageVocabulary) -> list[int]:
    """What the model is given so that its next token is the first code."""
    return [*caption_ids, vocabulary.begin_id]


def image_sequence(
    caption_ids: Sequence[int], codes: torch.Tensor, vocabulary: ImageVocabulary
) -> dict[str, torch.Tensor]:
    """One sample: labels stand on the codes and the end token only.

    codes: (tokens,) -> input_ids and labels, (caption + tokens + 2,) each
    """
    prompt = torch.tensor(image_prompt(caption_ids, vocabulary))
    picture = torch.cat([vocabulary.ids_of(codes), torch.tensor([vocabulary.end_id])])
    return {
        "input_ids": torch.cat([prompt, picture]),
        "labels": torch.cat([torch.full_like(prompt, IGNORE_INDEX), picture]),
    }


class CaptionedImages(Dataset):
    """Pairs of caption and picture as training sequences.

    Args:
        caption_ids: for each picture the token ids of its caption.
        codes: (N, tokens) int64.
        vocabulary: where the image's tokens are.
        caption_dropout: the share of draws that get ``empty_caption`` instead, which teaches the
            model pictures without a caption, as classifier-free guidance needs. Drawn from torch's
            global generator, whose state a Trainer keeps in its checkpoints.
        empty_caption: token ids.
    """

    def __init__(
        self,
        caption_ids: Sequence[Sequence[int]],
        codes: torch.Tensor,
        vocabulary: ImageVocabulary,
        *,
        caption_dropout: float = 0.0,
        empty_caption: Sequence[int] = (),
    ):
        if len(caption_ids) != len(codes):
            raise ValueError(f"{len(caption_ids)} captions for {len(codes)} pictures")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must lie in [0, 1]; got {caption_dropout}")
        self.caption_ids, self.codes, self.vocabulary = caption_ids, codes, vocabulary
        self.caption_dropout, self.empty_caption = caption_dropout, empty_caption

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        dropped = self.caption_dropout > 0 and float(torch.rand(())) < self.caption_dropout
        caption = self.empty_caption if dropped else self.caption_ids[index]
        return image_sequence(caption, self.codes[index], self.vocabulary)


@dataclass(frozen=True)
class ImageCollator:
    """A Trainer's ``data_collator`` that pads on the left: all pictures of a batch end together."""

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        input_ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        batch = {
            "input_ids": _pad_left(input_ids, self.pad_token_id),
            "attention_mask": _pad_left([torch.ones_like(ids) for ids in input_ids], 0),
        }
        if "labels" in samples[0]:
            batch["labels"] = _pad_left(
                [torch.as_tensor(sample["labels"]) for sample in samples], IGNORE_INDEX
            )
        return batch


def _pad_left(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side="left"
    )
