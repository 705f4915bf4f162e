"""Questions about real pictures: a frozen encoder sees the pictures, a text model answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels.imaging import IGNORE_INDEX, caption_ids, padding_id
from moe_kernels.modalities import join_features_and_text
from moe_kernels.modes import evaluating
from moe_kernels.moextend import ExpertExtender
from moe_kernels.programs.shared.encoder import EncodedPictures
from moe_kernels.programs.shared.pictures import DIGITS
from moe_kernels.programs.shared.stages import Workspace
from moe_kernels.programs.shared.training import in_batches, mean_nll, train

NUMBERS = (
    *DIGITS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen",
)  # fmt: skip
# Prompt, and number of pictures. The answer is a word or two and the end of the line.
QUESTIONS = {
    "digit": ("\nWhich digit is this?", 1),
    "sum": ("\nWhat is their sum?", 2),
    "category": ("\nWhat kind of picture is this?", 1),
}
END = "\n"
Batch = dict[str, Tensor]


# --- questions


@dataclass(frozen=True)
class Question:
    """A question about pictures.

    kind: a key of QUESTIONS; pictures: indices
    """

    kind: str
    pictures: tuple[int, ...]
    answer: str


@dataclass(frozen=True)
class WordQuestion:
    """A question about words in place of pictures, for the training of a small text model."""

    kind: str
    prompt: str
    answer: str


def ask_words(
    names: Sequence[str], kinds: Sequence[str], count: int, seed: int
) -> list[WordQuestion]:
    """Return random questions; each word stands one to four times, as a picture is many tokens."""
    rng = np.random.default_rng(seed)
    questions = []
    for _ in range(count):
        kind = kinds[rng.integers(len(kinds))]
        prompt, needed = QUESTIONS[kind]
        group = rng.integers(len(names), size=needed).tolist()
        words = "".join(f" {names[label]}" * rng.integers(1, 5) for label in group)
        questions.append(WordQuestion(kind, words + prompt, answer_of(names, kind, group)))
    return questions


def as_text(questions: Iterable[WordQuestion]) -> str:
    return "".join(f"{each.prompt} {each.answer}{END}" for each in questions)


def answer_of(names: Sequence[str], kind: str, labels: Sequence[int]) -> str:
    return NUMBERS[sum(labels)] if kind == "sum" else names[labels[0]]


def ask(pictures: EncodedPictures, kind: str, count: int | None, seed: int) -> list[Question]:
    """Return ``count`` questions of one kind, in random order; None: as many as pictures."""
    generator = torch.Generator().manual_seed(seed)
    needed = QUESTIONS[kind][1]
    count = len(pictures) if count is None else count
    # Each round uses every picture once.
    rounds = -(-count * needed // len(pictures))
    order = torch.cat([torch.randperm(len(pictures), generator=generator) for _ in range(rounds)])
    chosen = order[: count * needed].reshape(count, needed).tolist()
    labels = pictures.labels.tolist()
    return [
        Question(kind, tuple(group), answer_of(pictures.names, kind, [labels[i] for i in group]))
        for group in chosen
    ]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> dict[str, list[int]]:
    """Return input_ids, and labels of the answer alone."""
    ids = caption_ids(tokenizer, prompt)
    answer_ids = tokenizer(f" {answer}{END}", add_special_tokens=False).input_ids
    labels = [IGNORE_INDEX] * len(ids) + answer_ids
    return {"input_ids": ids + answer_ids, "labels": labels}


def pad(rows: Iterable[Any], value: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, rows)), True, value)


def collate_text(tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]]) -> Batch:
    """Return input_ids, attention_mask and labels (B, S), padded on the right."""
    return {
        "input_ids": pad([item["input_ids"] for item in items], padding_id(tokenizer)),
        "attention_mask": pad([[1] * len(item["input_ids"]) for item in items], 0),
        "labels": pad([item["labels"] for item in items], IGNORE_INDEX),
    }


@torch.no_grad()
def grade(model: PreTrainedModel, batches: Iterable[Batch], kinds: Iterable[str]) -> dict[str, Any]:
    """Return the loss of answers in nats a token, and the accuracy by kind of question.

    An answer is right if each of its tokens, and the end of the line, is the likeliest token after
    those before it. Greedy generation writes exactly such answers.

    Args:
        batches: arguments of the model, with labels
        kinds: those of the questions, in order
    """
    nll, tokens, right = 0.0, 0, []
    with evaluating(model):
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            loss = F.cross_entropy(logits.mT, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            nll += float(loss)
            tokens += int((labels != IGNORE_INDEX).sum())
            right += ((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)).all(1).tolist()
    by_kind: dict[str, list[bool]] = {}
    for kind, is_right in zip(kinds, right, strict=True):
        by_kind.setdefault(kind, []).append(is_right)
    accuracy = {kind: float(np.mean(each)) for kind, each in by_kind.items()}
    return {"nll": nll / tokens, "accuracy": accuracy}


def grade_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[WordQuestion],
    size: int = 100,
) -> dict[str, Any]:  # fmt: skip
    """Grade a model, patched or not, on questions about words; see :func:`grade`."""
    items = [encode(tokenizer, each.prompt, each.answer) for each in questions]
    batches = [collate_text(tokenizer, some) for some in in_batches(items, size)]
    return grade(model, batches, [each.kind for each in questions])


@dataclass(frozen=True)
class QuestionSet:
    """A data set: an item has features (N, d), the ids of question and answer, and labels."""

    pictures: EncodedPictures
    questions: list[Question]
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = self.questions[index]
        features = self.pictures.features[list(question.pictures)].flatten(0, 1)
        prompt = QUESTIONS[question.kind][0]
        return {"features": features} | encode(self.tokenizer, prompt, question.answer)

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Return features (B, N, d) and feature_mask; input_ids, attention_mask, labels (B, S)."""
        features = [item["features"] for item in items]
        return collate_text(self.tokenizer, items) | {
            "features": pad(features, 0.0),
            "feature_mask": pad([torch.ones(len(each)) for each in features], 0),
        }

    def batches(self, size: int) -> list[Batch]:
        return [self.collate(items) for items in in_batches(list(self), size)]

    def most_common_answer(self) -> dict[str, float]:
        """Return by kind the accuracy of always giving the commonest answer."""
        answers: dict[str, list[str]] = {}
        for question in self.questions:
            answers.setdefault(question.kind, []).append(question.answer)
        return {k: max(map(each.count, set(each))) / len(each) for k, each in answers.items()}


# --- a text model that sees pictures


@dataclass(frozen=True)
class Viewer:
    """A model with a projector, which turns batches of questions into the model's arguments.

    whole_sequences: question and answer have the pictures' modality too, so that experts behind
        its gate serve them; the model must be patched with it in ``sequence_modalities``
    begin: tokens before the features; 1 if text begins with a special token
    """

    extender: ExpertExtender
    modality: str = "image"
    whole_sequences: bool = False
    begin: int = 0

    @property
    def model(self) -> PreTrainedModel:
        return self.extender.model

    def join(self, batch: Batch, padding_side: str = "right") -> Batch:
        """Turn a batch of :class:`QuestionSet` into arguments of forward, with labels."""
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        features = self.extender.projector(self.modality)(batch.pop("features"))
        joined = join_features_and_text(
            self.model, features, batch.pop("input_ids"), modality=self.modality, at=self.begin,
            padding_side=padding_side, **batch,
        )  # fmt: skip
        if self.whole_sequences:
            number = self.extender.patched.config.modalities.index(self.modality) + 1
            joined["modality_ids"] = torch.where(joined["attention_mask"] == 1, number, -1)
        return joined

    def _take_questions(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Join a batch in a pre-hook of the model, so that gradients reach the projector."""
        if "features" not in kwargs:
            return None
        names = ("features", "feature_mask", "input_ids", "attention_mask", "labels")
        batch = {name: kwargs.pop(name) for name in names}
        return args, kwargs | self.join(batch)

    def learn(
        self,
        questions: QuestionSet,
        held_out: list[Batch],
        workspace: Workspace,
        *,
        checkpoints: str = "adapter",
        **arguments: Any,
    ) -> dict[str, Any]:
        """Train the trainable parameters, from a checkpoint in ``workspace``; return the history.

        checkpoints: "adapter" for added parameters; "model" if all of the model trains
        """
        model = self.extender.patched if checkpoints == "adapter" else self.model
        hook = self.model.register_forward_pre_hook(
            self._take_questions, with_kwargs=True, prepend=True
        )
        try:
            return train(
                model, questions, lambda model: mean_nll(model, map(self.join, held_out)),
                workspace, collator=questions.collate, remove_unused_columns=False, **arguments,
            )  # fmt: skip
        finally:
            hook.remove()

    def grade(self, questions: QuestionSet, size: int = 100) -> dict[str, Any]:
        """Return the result of :func:`grade`."""
        kinds = [each.kind for each in questions.questions]
        return grade(self.model, map(self.join, questions.batches(size)), kinds)

    @torch.no_grad()
    def answer(self, questions: QuestionSet, size: int = 100, max_new_tokens: int = 8) -> list[str]:
        """Return the answers that the model writes, greedily, to the end of the line."""
        tokenizer = questions.tokenizer
        end = tokenizer(END, add_special_tokens=False).input_ids[-1]
        written: list[str] = []
        for items in in_batches(list(questions), size):
            for item in items:
                prompt = item["labels"].count(IGNORE_INDEX)
                item.update({name: item[name][:prompt] for name in ("input_ids", "labels")})
            joined = self.join(questions.collate(items), padding_side="left")
            del joined["labels"]
            with evaluating(self.model):
                ids = self.model.generate(
                    **joined, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end,
                    pad_token_id=padding_id(tokenizer),
                )  # fmt: skip
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            written += [text.split(END)[0].strip() for text in texts]
        return written


# --- training


def align(
    viewer: Viewer,
    questions: QuestionSet,
    held_out: list[Batch],
    workspace: Workspace,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Add a projector unless present, and train it alone; saved in ``workspace``/adapter."""
    torch.manual_seed(arguments["seed"])
    in_features = questions.pictures.features.shape[-1]
    viewer.extender.add_projector(in_features, modality=viewer.modality)
    return fine_tune(viewer, questions, held_out, workspace, **arguments)


@torch.no_grad()
def joined_batches(viewer: Viewer, questions: QuestionSet, size: int) -> list[Batch]:
    """Return batches for ``score_layers`` and ``disturbance``."""
    return [viewer.join(batch) for batch in questions.batches(size)]


def fine_tune(
    viewer: Viewer,
    questions: QuestionSet,
    held_out: list[Batch],
    workspace: Workspace,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train what was added; saved in ``workspace``/adapter."""
    history = viewer.learn(questions, held_out, workspace, **arguments)
    viewer.extender.patched.save_adapter(workspace.folder / "adapter")
    return history
