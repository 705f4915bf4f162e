"""Layout of captions and pictures in one sequence of token ids, and its inverse.

    caption ids | begin-of-image | code_0 ... code_{n-1} in raster order | end-of-image

The loss covers the codes and the end token. Begin-of-image is an added token, so its row has the
image modality and uses the adapters; it must, since it predicts the first code. A text may contain
several pictures, each with its own begin and end token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from moe_kernels import arguments
from moe_kernels.imaging.arrays import as_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
_BEGIN, _END, _FIRST_CODE = 0, 1, 2


@dataclass(frozen=True)
class ImageVocabulary:
    """Ids of the image tokens in the model's vocabulary. Only this class knows their order.

    They are begin-of-image, end-of-image, code 0, and then the other codes.

    Attributes:
        first_id: id of begin-of-image.
        num_codes: number of codes, without begin and end.

    Raises:
        ValueError: ``first_id`` is below 0, or there is no code.

    Example:
        >>> import torch
        >>> from moe_kernels.imaging import ImageVocabulary
        >>> ImageVocabulary.size(8)  # the tokens to add to a model for 8 codes
        10
        >>> vocabulary = ImageVocabulary.from_token_ids(range(64, 74))
        >>> vocabulary.begin_id, vocabulary.end_id, vocabulary.code_ids
        (64, 65, range(66, 74))
        >>> vocabulary.ids_of(torch.tensor([0, 7]))
        tensor([66, 73])
    """

    first_id: int
    num_codes: int

    def __post_init__(self):
        numbers = arguments.integers(first_id=self.first_id, num_codes=self.num_codes)
        for name, number in zip(("first_id", "num_codes"), numbers, strict=True):
            object.__setattr__(self, name, number)
        if self.first_id < 0 or self.num_codes < 1:
            raise ValueError(
                f"need first_id >= 0 and num_codes >= 1; got {self.first_id} and {self.num_codes}"
            )

    @classmethod
    def from_token_ids(cls, token_ids: range) -> ImageVocabulary:
        """Return the vocabulary for the range of ids that ``add_modality_tokens`` returned."""
        if not isinstance(token_ids, range):
            raise TypeError(
                "token_ids must be the range that add_modality_tokens returned; got "
                f"{type(token_ids).__name__}"
            )
        return cls(token_ids.start, len(token_ids) - _FIRST_CODE)

    @staticmethod
    def size(num_codes: int) -> int:
        """Return the number of tokens to add to a model for this many codes."""
        return num_codes + _FIRST_CODE

    @property
    def begin_id(self) -> int:
        """The id of begin-of-image."""
        return self.first_id + _BEGIN

    @property
    def end_id(self) -> int:
        """The id of end-of-image."""
        return self.first_id + _END

    @property
    def code_ids(self) -> range:
        """The ids of the codes, in their order."""
        return range(self.first_id + _FIRST_CODE, self.first_id + _FIRST_CODE + self.num_codes)

    @property
    def token_ids(self) -> range:
        """The ids of all image tokens: begin, end, codes."""
        return range(self.first_id, self.first_id + self.size(self.num_codes))

    def ids_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the token ids, int64, of codes 0..num_codes-1 of any integer dtype and shape."""
        return _checked(codes, range(self.num_codes), "codes") + self.code_ids.start

    def codes_of(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the codes 0..num_codes-1, int64, of token ids of any integer dtype and shape."""
        return _checked(token_ids, self.code_ids, "ids of image codes") - self.code_ids.start


def _checked(values: torch.Tensor, allowed: range, name: str) -> torch.Tensor:
    """Return the values in int64, where no id overflows.

    Raises:
        TypeError: the values are not integers.
        ValueError: a value is not allowed.
    """
    values = as_tensor(values, name)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {values.dtype}")
    values = values.long()
    if values.numel() and not (
        allowed.start <= int(values.min()) and int(values.max()) < allowed.stop
    ):
        raise ValueError(
            f"{name} must lie in {allowed.start}..{allowed.stop - 1}; "
            f"got {int(values.min())}..{int(values.max())}"
        )
    return values


def _check_codes(codes: torch.Tensor, index: int) -> None:
    """Raise ValueError unless the codes of a picture are a row of integers."""
    dtype, shape = codes.dtype, tuple(codes.shape)
    if len(shape) != 1 or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(
            f"codes must be integers (N, tokens); got {dtype} {shape} for picture {index}"
        )


def caption_ids(tokenizer: PreTrainedTokenizerBase, caption: str) -> list[int]:
    """Return the token ids of a caption, for training and generation alike.

    They begin with begin-of-text exactly if the tokenizer puts it there. Other special tokens that
    the tokenizer adds (end-of-text, say) are left out, since the picture follows the caption.

    Args:
        tokenizer: of transformers.
        caption: the text.

    Raises:
        TypeError: the caption is not a string.
        ValueError: it holds half of a surrogate pair, which no encoding has.
    """
    if not isinstance(caption, str):
        raise TypeError(f"a caption must be a string; got {caption!r}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a caption must be valid Unicode; got {caption!r}") from error
    ids = list(tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)
    marked = list(tokenizer(caption, verbose=False).input_ids)
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is not None and marked[:1] == [begin] and ids[:1] != [begin]:
        ids.insert(0, begin)
    return ids


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the pad token, or of end-of-text if the tokenizer has no pad token.

    Either works, since padding is masked.

    Raises:
        ValueError: the tokenizer has neither token.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a pad token nor an end-of-text token: set one")


def image_prompt(caption_ids: Sequence[int], vocabulary: ImageVocabulary) -> list[int]:
    """Return the prompt whose next token is the first code: the caption, then begin-of-image.

    Raises:
        ValueError: the caption contains image tokens.
    """
    return [*text_ids(caption_ids, vocabulary, "the caption"), vocabulary.begin_id]


def image_sequence(
    caption_ids: Sequence[int], codes: torch.Tensor, vocabulary: ImageVocabulary
) -> dict[str, torch.Tensor]:
    """Return one training sample, with labels on the codes and the end token only.

    Args:
        caption_ids: token ids of the caption.
        codes: (tokens,), of the picture.
        vocabulary: ids of the image tokens.

    Returns:
        input_ids and labels, (caption + tokens + 2,) each.
    """
    caption = text_ids(caption_ids, vocabulary, "the caption")
    return mixed_sequence([caption, as_tensor(codes, "codes")], vocabulary)


def mixed_sequence(
    pieces: Iterable[list[int] | torch.Tensor],
    vocabulary: ImageVocabulary,
    *,
    text_labels: bool = False,
) -> dict[str, torch.Tensor]:
    """Return text and pictures in any order as one sample; :func:`split_images` is the inverse.

    Args:
        pieces: texts and pictures. A list of token ids is text; a tensor of codes, (tokens,), is a
            picture, to which this function adds the begin and end tokens.
        vocabulary: ids of the image tokens.
        text_labels: put labels on text and on begin-of-image too, so that the model learns when to
            start a picture; otherwise only codes and end tokens have labels.

    Returns:
        input_ids and labels, (S,) int64 each.

    Raises:
        ValueError: a text contains image tokens, or codes are outside the vocabulary.
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
        "input_ids": torch.tensor(ids, dtype=torch.long, device="cpu"),
        "labels": torch.tensor(labels, dtype=torch.long, device="cpu"),
    }


def split_images(
    token_ids: Sequence[int] | torch.Tensor,
    vocabulary: ImageVocabulary,
    *,
    drop_unfinished: bool = False,
) -> list[list[int] | torch.Tensor]:
    """Split a sequence into texts (lists of token ids) and pictures (codes), in their order.

    Args:
        token_ids: (S,), a sequence of :func:`mixed_sequence` or from ``generate``.
        vocabulary: ids of the image tokens.
        drop_unfinished: leave out a last picture without an end token, which occurs if
            ``max_new_tokens`` was too small.

    Returns:
        The pieces, without empty texts. A picture is an int64 tensor (tokens,).

    Raises:
        ValueError: a code or an end token is outside a picture, any other token is inside one, or a
            picture is unfinished; says at which position.
    """
    pieces: list[list[int] | torch.Tensor] = []
    text: list[int] = []
    codes: list[int] | None = None  # codes of the open picture
    row = as_tensor(token_ids, "token_ids")
    if row.ndim != 1:
        raise ValueError(f"token_ids must be one row (S,); got {tuple(row.shape)}")
    for position, token_id in enumerate(row.tolist()):
        if token_id not in vocabulary.token_ids:
            if codes is not None:
                raise ValueError(f"text token {token_id} inside a picture, at position {position}")
            text.append(token_id)
        elif (token_id == vocabulary.begin_id) != (codes is None):
            where = "outside" if codes is None else "inside"
            raise ValueError(f"image token {token_id} {where} a picture, at position {position}")
        elif token_id == vocabulary.begin_id:
            pieces += [text] if text else []
            text, codes = [], []
        elif token_id == vocabulary.end_id:
            ids = torch.tensor(codes, dtype=torch.long, device="cpu")
            pieces.append(vocabulary.codes_of(ids))
            codes = None
        else:
            codes.append(token_id)
    if codes is not None and not drop_unfinished:
        raise ValueError(
            f"the last picture has {len(codes)} codes and no end token: pass drop_unfinished=True "
            "to leave it out"
        )
    return pieces + ([text] if text else [])


def text_ids(
    token_ids: Sequence[int] | torch.Tensor, vocabulary: ImageVocabulary, name: str
) -> list[int]:
    """Return the ids as a list.

    Raises:
        ValueError: an id is an image token's or is negative; the error has this name.
        TypeError: the ids are not integers.
    """
    if isinstance(token_ids, str):
        raise TypeError(
            f"{name} must be token ids, of caption_ids(tokenizer, caption); got the string "
            f"{token_ids!r}"
        )
    ids = as_tensor(token_ids, name)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"{name} must hold integer token ids; got {ids.dtype}")
    if ids.ndim != 1 or (ids.numel() and int(ids.long().min()) < 0):
        raise ValueError(f"{name} must be one row of token ids of at least 0; got {token_ids!r}")
    ids = ids.tolist()
    found = [token_id for token_id in ids if token_id in vocabulary.token_ids]
    if found:
        raise ValueError(f"{name} contains image tokens: ids {found[:5]}")
    return ids


class CaptionedImages(Dataset):
    """Dataset of caption and picture pairs as training sequences.

    Caption dropout replaces a share of the captions by ``empty_caption``, so that the model also
    learns pictures without a caption, which classifier-free guidance needs. The captions to drop
    follow from ``seed``, the epoch, the index, and the number of times that the index was drawn in
    the epoch. They do not follow from a global generator: data loaders read ahead, so a checkpoint
    would hold the generator's state at a later batch, and a resumed run would drop other captions.
    To resume exactly, call :meth:`set_epoch` at the beginning of each epoch. Call it too if a
    DataLoader starts new workers each epoch, since their counts start at zero again.

    Args:
        caption_ids: for each picture the token ids of its caption, from :func:`caption_ids`.
        codes: (N, tokens) of any integer dtype, or a list of N rows.
        vocabulary: ids of the image tokens.
        caption_dropout: probability that a draw gets ``empty_caption``.
        empty_caption: token ids; ``generate_images`` uses ``caption_ids(tokenizer, "")``.
        seed: seed of the dropout.

    Raises:
        ValueError: captions and pictures differ in number, codes are not integers (N, tokens), a
            caption contains image tokens, or the dropout is outside [0, 1].

    Example:
        >>> import torch
        >>> from moe_kernels.imaging import CaptionedImages, ImageVocabulary
        >>> vocabulary = ImageVocabulary.from_token_ids(range(64, 74))
        >>> codes = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]])
        >>> data = CaptionedImages([[5], [5, 6, 7]], codes, vocabulary)
        >>> data[0]["input_ids"]
        tensor([ 5, 64, 66, 67, 68, 69, 65])
        >>> data[0]["labels"]
        tensor([-100, -100,   66,   67,   68,   69,   65])
    """

    def __init__(
        self,
        caption_ids: Sequence[Sequence[int]],
        codes: torch.Tensor | Sequence[torch.Tensor | Sequence[int]],
        vocabulary: ImageVocabulary,
        *,
        caption_dropout: float = 0.0,
        empty_caption: Sequence[int] = (),
        seed: int = 0,
    ):
        if len(caption_ids) != len(codes):
            raise ValueError(
                f"every picture needs a caption; got {len(caption_ids)} captions for {len(codes)} "
                "pictures"
            )
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout must lie in [0, 1]; got {caption_dropout}")
        # Of a tensor, one picture tells the dtype and shape of all.
        for index in range(len(codes) if isinstance(codes, list | tuple) else min(len(codes), 1)):
            _check_codes(as_tensor(codes[index], f"codes of picture {index}"), index)
        for index, caption in enumerate(caption_ids):
            text_ids(caption, vocabulary, f"caption {index}")
        text_ids(empty_caption, vocabulary, "empty_caption")
        self.caption_ids, self.codes, self.vocabulary = caption_ids, codes, vocabulary
        self.caption_dropout, self.empty_caption = caption_dropout, empty_caption
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, which drops different captions than the others."""
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
    """``data_collator`` for the Trainer; it pads on the left, so that all pictures end together.

    The first token of a sample has no label: padding stands before it, and would predict it.

    Attributes:
        pad_token_id: id of the padding; see :func:`padding_id`.

    Example:
        >>> import torch
        >>> from moe_kernels.imaging import ImageCollator
        >>> batch = ImageCollator(0)([
        ...     {"input_ids": torch.tensor([5, 64, 66, 65])},
        ...     {"input_ids": torch.tensor([5, 6, 7, 64, 66, 65])},
        ... ])
        >>> batch["input_ids"]
        tensor([[ 0,  0,  5, 64, 66, 65],
                [ 5,  6,  7, 64, 66, 65]])
        >>> batch["attention_mask"][0]
        tensor([0, 0, 1, 1, 1, 1])
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        input_ids = [as_tensor(sample["input_ids"], "input_ids") for sample in samples]
        batch = {
            "input_ids": _pad_left(input_ids, self.pad_token_id),
            "attention_mask": _pad_left([torch.ones_like(ids) for ids in input_ids], 0),
        }
        labelled = ["labels" in sample for sample in samples]
        if any(labelled):
            if not all(labelled):
                raise ValueError(
                    "some samples of this batch have labels, and others have none: give them to "
                    "all or to none"
                )
            labels = [as_tensor(sample["labels"], "labels").clone() for sample in samples]
            for each in labels:
                each[:1] = IGNORE_INDEX
            batch["labels"] = _pad_left(labels, IGNORE_INDEX)
        return batch


def _pad_left(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side="left"
    )
