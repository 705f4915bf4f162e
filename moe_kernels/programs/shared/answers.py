"""Greedy answers to plain questions: what a conversion has left of a model, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels.programs.shared.tables import markdown_table

QUESTIONS = (
    "What is the capital of France?",
    "How many days are in a week?",
    "What colour is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "What is 7 plus 5?",
    "What do bees make?",
    "Name three fruits.",
    "What is the opposite of hot?",
    "What is water made of?",
    "Which planet do we live on?",
    "Write one sentence about a dog.",
    "What is the largest ocean?",
    "How do I boil an egg?",
    "What language is spoken in Brazil?",
    "What does a doctor do?",
    "What is a prime number?",
    "Write a Python function that adds two numbers.",
    "Why do leaves fall in autumn?",
    "What is the freezing point of water in degrees Celsius?",
    "Say hello in Spanish.",
)


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most_tokens: int
) -> list[str]:
    """Return the answers to :data:`QUESTIONS`, cut after ``most_tokens`` tokens.

    A model with a chat template gets each question as a user's message, another one as a line.
    """
    answers = []
    for question in QUESTIONS:
        inputs = _prompt(tokenizer, question).to(model.device)
        made = model.generate(
            **inputs, max_new_tokens=most_tokens, do_sample=False, pad_token_id=_padding(tokenizer)
        )
        new = made[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str):
    if not tokenizer.chat_template:
        return tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def _padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def answers_table(columns: dict[str, Sequence[str]]) -> str:
    """Return a Markdown table with a row for each question and a column for each model."""
    cells = zip(QUESTIONS, *columns.values(), strict=True)
    rows = [(question, *map(_cell, answers)) for question, *answers in cells]
    return markdown_table(("question", *columns), rows) + "\n"


def _cell(text: str) -> str:
    """Return a text as one cell: no line break, nothing that ends the cell or becomes a tag."""
    one_line = " ".join(text.split())
    for mark in "\\`|<*_":
        one_line = one_line.replace(mark, f"\\{mark}")
    return one_line
