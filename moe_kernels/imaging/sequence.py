"""How captions and pictures become one sequence of token ids, and are taken apart again.

    caption ids | begin-of-image | code_0 ... code_{n-1} in raster order | end-of-image

The loss falls on the codes and the end token. Begin-of-image is an added token, so the model treats
its row as the image modality: it is the row that predicts the first code, and the adapters must see
it. A text may hold several pictures; each has its begin and its end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def caption_ids(tokenizer: Any, caption: str) -> list[int]:
    """The token ids of a caption, for training and generation alike.

    Begin-of-text stands in front exactly if the tokenizer puts it there; whatever else it adds (an
    end-of-text, say) is left out, as the picture goes on from the caption.

    tokenizer: of transformers
    """
    ids = list(tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)
    marked = list(tokenizer(caption, verbose=False).input_ids)
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is not None and marked[:1] == [begin] and ids[:1] != [begin]:
        ids.insert(0, begin)
    return ids


def padding_id(tokenizer: Any) -> int:
    """The pad token's id, or end-of-text's where there is none: padding is masked in any case.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a pad token nor an end-of-text token: set one")


def image_prompt(caption_ids: Sequence[int], vocabulary: ImageVocabulary) -> list[int]:
    """What the model is given so that its next token is the first code.

    Raises:
        ValueError: the caption has image tokens in it.
    """
    return [*text_ids(caption_ids, vocabulary, "the caption"), vocabulary.begin_id]


def image_sequence(
    caption_ids: Sequence[int], codes: torch.Tensor, vocabulary: ImageVocabulary
) -> dict[str, torch.Tensor]:
    """One sample: labels stand on the codes and the end token only.

    codes: (tokens,) -> input_ids and labels, (caption + tokens + 2,) each
    """
    caption = text_ids(caption_ids, vocabulary, "the caption")
    return mixed_sequence([caption, torch.as_tensor(codes)], vocabulary)


def mixed_sequence(
    pieces: Iterable[list[int] | torch.Tensor],
    vocabulary: ImageVocabulary,
    *,
    text_labels: bool = False,
) -> dict[str, torch.Tensor]:
    """Text and pictures in any order as one sample; :func:`split_images` takes it apart again.

    Args:
        pieces: a list of token ids is text, a tensor of codes, (tokens,), is a picture, which gets
            its begin and end here.
        vocabulary: where the image's tokens are.
        text_labels: put labels on text and on begin-of-image too, so that the model learns when to
            start a picture; else they stand on codes and end tokens only.

    Returns:
        input_ids and labels, (S,) int64 each.

    Raises:
        ValueError: image tokens in a text, or codes outside the vocabulary.
        TypeError: a piece is neither a list nor a tensor.
    """
    ids, labels = [], []
    for piece in pieces:
        if isinstance(piece, torch.Tensor):
            prompt = [vocabulary.begin_id]
            picture = [*vocabulary.ids_of(piece).tolist(), vocabulary.end_id]
        elif isinstance(piece, list | tuple):
            prompt, picture = text_ids(piece, vocabulary, "a text"), []
        else:
            raise TypeError(
                f"a piece must be a list of token ids or a tensor of codes; got {type(piece)}"
            )
        ids += prompt + picture
        labels += (prompt if text_labels else [IGNORE_INDEX] * len(prompt)) + picture
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
    }


def split_images(
    token_ids: Sequence[int] | torch.Tensor,
    vocabulary: ImageVocabulary,
    *,
    drop_unfinished: bool = False,
) -> list[list[int] | torch.Tensor]:
    """One sequence taken apart: texts as lists of token ids, pictures as codes, in their order.

    Args:
        token_ids: (S,), as :func:`mixed_sequence` lays it out or ``generate`` returns it.
        vocabulary: where the image's tokens are.
        drop_unfinished: leave out a picture at the end whose end token is missing, as when
            ``max_new_tokens`` did not suffice.

    Returns:
        No empty text; a picture is an int64 tensor (tokens,).

    Raises:
        ValueError: a code or an end token outside a picture, anything else inside one, or an
            unfinished picture; says where.
    """
    pieces: list[list[int] | torch.Tensor] = []
    text: list[int] = []
    codes: list[int] | None = None  # of the picture that is open
    for position, token_id in enumerate(torch.as_tensor(token_ids).tolist()):
        if token_id not in vocabulary.token_ids:
            if codes is not None:
                raise ValueError(f"text token {token_id} inside a picture, at position {position}")
            text.append(token_id)
        elif (token_id == vocabulary.begin_id) != (codes is None):
            place = "outside" if codes is None else "inside"
            raise ValueError(f"image token {token_id} {place} a picture, at position {position}")
        elif token_id == vocabulary.begin_id:
            pieces += [text] if text else []
            text, codes = [], []
        elif token_id == vocabulary.end_id:
            pieces.append(vocabulary.codes_of(torch.tensor(codes, dtype=torch.long)))
            codes = None
        else:
            codes.append(token_id)
    if codes is not None and not drop_unfinished:
        raise ValueError(f"the last picture has no end token: {len(codes)} codes, then nothing")
    return pieces + ([text] if text else [])


def text_ids(
    token_ids: Sequence[int] | torch.Tensor, vocabulary: ImageVocabulary, what: str
) -> list[int]:
    """The ids as a list. Raises ValueError, naming ``what``, if there are image tokens in them."""
    ids = torch.as_tensor(token_ids).tolist()
    found = [token_id for token_id in ids if token_id in vocabulary.token_ids]
    if found:
        raise ValueError(f"{what} has image tokens in it: ids {found[:5]}")
    return ids


class CaptionedImages(Dataset):
    """Pairs of caption and picture as training sequences.

    Args:
        caption_ids: for each picture the token ids of its caption, from :func:`caption_ids`.
        codes: (N, tokens) int64.
        vocabulary: where the image's tokens are.
        caption_dropout: the share of draws that get ``empty_caption`` instead, which teaches the
            model pictures without a caption, as classifier-free guidance needs. It follows from
            ``seed``, the epoch, the index and how often that was drawn in the epoch, and not from a
            global generator: data loaders read ahead, so that a checkpoint would hold the state of
            a later batch, and a resumed run drop other captions. To resume exactly, call
            :meth:`set_epoch` at the beginning of each epoch; so must a DataLoader with workers that
            are started anew each epoch, since their counts begin anew too.
        empty_caption: token ids; ``caption_ids(tokenizer, "")`` is what ``generate_images`` uses.
        seed: of the dropout.

    Raises:
        ValueError: captions and pictures differ in number, a caption has image tokens in it, or a
            dropout outside [0, 1].
    """

    def __init__(
        self,
        caption_ids: Sequence[Sequence[int]],
        codes: torch.Tensor,
        vocabulary: ImageVocabulary,
        *,
        caption_dropout: float = 0.0,
        empty_caption: Sequence[int] = (),
        seed: int = 0,
    ):
        if len(caption_ids) != len(codes):
            raise ValueError(f"{len(caption_ids)} captions for {len(codes)} pictures")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must lie in [0, 1]; got {caption_dropout}")
        for index, caption in enumerate(caption_ids):
            text_ids(caption, vocabulary, f"caption {index}")
        text_ids(empty_caption, vocabulary, "empty_caption")
        self.caption_ids, self.codes, self.vocabulary = caption_ids, codes, vocabulary
        self.caption_dropout, self.empty_caption = caption_dropout, empty_caption
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: its dropout is another one."""
        self._epoch, self._draws = epoch, Counter()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        caption = self.empty_caption if self._is_dropped(index) else self.caption_ids[index]
        return image_sequence(caption, self.codes[index], self.vocabulary)

    def _is_dropped(self, index: int) -> bool:
        draw = self._draws[index]
        self._draws[index] += 1
        generator = random.Random(f"{self.seed}/{self._epoch}/{index}/{draw}")
        return generator.random() < self.caption_dropout


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
