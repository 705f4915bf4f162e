"""The head of moextend.py's page: what it shows in a few sentences, and how it was measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.moextend.figures import RANDOM, at_step_0, forgotten, grounds, since_start
from studies.moextend.runs import LORA_RANKS
from studies.report import (
    FAILS,
    HOLDS,
    Results,
    difference,
    mean_and_interval,
    mean_and_spread,
    paired,
    present,
    tuning_section,
    values,
)


def heading(data: Results, text_kept: str) -> str:
    budget, text = data["budget"], data["budget"]["text"]
    seeds = len(next(iter(data["runs"].values()))["seeds"])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    seen = grounds(data, lambda g: 100 * g["encoder_accuracy"]["test"])
    read = {
        kind: grounds(data, lambda g, kind=kind: 100 * g["words"]["accuracy"][kind])
        for kind in ("digit", "sum")
    }
    learnt = grounds(data, lambda g: 100 * g["words_learnt"])
    there = {
        kind: grounds(data, lambda g, kind=kind: g["prompts_learnt"][kind])
        for kind in ("digit", "sum")
    }
    return f"""# What do added experts buy? The evidence for MoExtend

Written by `make results` from `moextend.json`; nothing here is typed by hand, verdicts included.
The method is that of arXiv 2408.03511 ([moextend.md](../moextend.md)).

{summary(data, text_kept)}

## How it was measured

Verdicts: a claim holds where the 95 % interval of the difference, paired by seed (Student's t),
lies on its side of zero; it does not hold where the interval lies on the other side, so that the
reverse is shown; else it is undecided, which does not mean that two things are equal. Each interval
is of its own comparison: of twenty, one leaves out zero by chance.

Base: an OLMoE of {text["layers"]} layers, hidden size {text["hidden_size"]}, {text["experts"]}
experts of {text["intermediate_size"]}, {text["experts_per_token"]} chosen, that has learnt Python's
own documentation and {budget["word_questions"]:,} questions in words (" six six two / What is their
sum? eight") for {text["text_steps"]} steps. Of such questions it answers
{mean_and_spread(read["digit"], 1)} % (which digit) and {mean_and_spread(read["sum"], 1)} % (sum of
two) right. That is memory: {mean_and_spread(learnt, 1)} % of those asked here are among those that
it learnt, which are {mean_and_spread(there["digit"], 0)} and {mean_and_spread(there["sum"], 0)}
different ones. Pictures are MNIST digits, which a small convolutional encoder learnt to tell apart
(it names {mean_and_spread(seen, 1)} % of those held out) and which is frozen then; a projector
learns for {budget["align_steps"]} steps to hand what it sees to the frozen base. From there each
method learns for {budget["steps"]} steps of {budget["batch"]} questions, with the projector frozen
(of code, of {budget["code_batch"]} blocks of {budget["code_block"]} tokens).
{seeds} seeds of everything: base, encoder, pictures held out, order. A toy: what holds here need
not hold for forty-seven billion parameters, and the reverse.

Loss is in nats a token of the answers to {2 * budget["held_out_questions"]:,} questions about
{budget["encoder"]["held_out"] // 2} pictures that neither the encoder nor any training question
saw; an answer is right where greedy generation writes it to the end of the line. ± is the standard
deviation over seeds. Learning rates were chosen on seed {data["tuning"]["seed"]}, which is not
among those reported, by the loss on questions about other held-out pictures (of code, on other
modules). Each kind of training has a rate of its own, also each start, calibration and number of
experts; those behind a gate are tuned with experts in every second layer, whatever layers their
runs have, so that no choice of layers is favoured. Two methods that compute the same on the task
have one rate: experts without a gate from our start and with one by sequence, LoRA on all tokens
and by sequence.

What is compared:

- **as published**: the paper's architecture, without a gate, experts copied after the routers'
  tuning; scores count what is really selected, where the published script counts the least likely.
- **our start**: experts copied from the most selected, with a router of their own, before tuning.
- **gate by token**: only pictures' tokens may choose added experts; **by sequence**: all tokens of
  a question with a picture (of code: of a sequence with the task's id) may. **Masked LoRA**: the
  same for low-rank updates.
- LoRA has rank {LORA_RANKS["attention"]} on attention and {LORA_RANKS["experts"]} on the experts of
  *all* layers, about as many parameters as one expert in *half* of them: where parameters sit
  differs, not how many there are.
- Full fine-tuning trains forty times as many. "At a low rate" has a rate that was set, not tuned.
- The tuning seed is one, and intervals do not hold its noise. Seeds have bases, encoders and splits
  of their own; they share MNIST and the held-out documentation.
- With another number of threads sums round differently, from the base on: a run that is made again
  then differs by as much as seeds do (`python moextend.py --remake` shows it). Methods are to be
  compared within one sweep, where they share a base.

{tuning_tables(data)}

Set aside before the runs were made: {budget["core_hours"]} hours of a core. Taken:
{data["seconds"] / 3600:.1f} hours of processes with {data["threads"]} thread(s), beside other work;
{versions}."""


def summary(data: Results, text_kept: str) -> str:
    """What the sections show, in a few sentences; ``text_kept``: the verdict on that."""
    sentences = (_of_forgetting, _of_learning, _of_lora, _of_choice, _of_starts)
    said = [_of_text(text_kept), *(sentence(data) for sentence in sentences)]
    listed = "".join(f"\n- {each}" for each in said if each)
    return f"## In short\n{listed}" if listed else ""


def _has(data: Results, *names: str) -> bool:
    return len(present(data, names)) == len(names)


def _of_text(said: str) -> str:
    if not said:
        return ""
    claim = said.removeprefix(HOLDS).removeprefix(FAILS).strip()
    return claim[0].upper() + claim[1:] if said.startswith(HOLDS) else f"Not so: {claim}"


def _of_forgetting(data: Results) -> str:
    if not _has(data, "published", "full", "code-published", "code-full"):
        return ""
    step, after, full = (
        {task: mean_and_interval(values(data, prefix + name, get))
         for task, prefix in (("pictures", ""), ("code", "code-"))}
        for name, get in (("published", at_step_0), ("published", forgotten), ("full", forgotten))
    )  # fmt: skip
    return (
        f"As published, without a gate, adding experts changes text loss by {step['pictures']} "
        f"nats a token before anything is learnt ({step['code']} for code), training by "
        f"{after['pictures']} with pictures and {after['code']} with code; full fine-tuning by "
        f"{full['pictures']} and {full['code']}. At slower rates full fine-tuning and LoRA forget "
        "less too (section 2)."
    )


def _of_learning(data: Results) -> str:
    if not _has(data, "gated", "sequence", "projector"):
        return ""
    return (
        "Against the aligned projector that all start from, experts change the loss on questions "
        f"by {mean_and_interval(since_start(data, 'gated'))} nats a token behind a gate by token, "
        f"by {mean_and_interval(since_start(data, 'sequence'))} by sequence; a projector that "
        "trains on, with a third of the parameters, by "
        f"{mean_and_interval(since_start(data, 'projector'))}."
    )


def _of_lora(data: Results) -> str:
    if not _has(data, "lora-sequence", "sequence", "code-lora", "code-gated"):
        return ""
    return (
        "Masked LoRA of as many parameters, with text as safe, differs from experts behind a gate "
        f"by {difference(data, 'lora-sequence', 'sequence')} nats a token on questions (both by "
        f"sequence) and {difference(data, 'code-lora', 'code-gated')} on code: lower is better."
    )


def _of_choice(data: Results) -> str:
    there = present(data, RANDOM)
    if not there or not _has(data, "sequence"):
        return ""
    apart = np.mean([paired(data, "sequence", name) for name in there], axis=0)
    return (
        "Layers chosen by shift differ from random halves by "
        f"{mean_and_interval(apart)} nats a token (lower: the choice is better)."
    )


def _of_starts(data: Results) -> str:
    if not _has(data, "sequence", "init-mean", "init-random", "calibration-none"):
        return ""
    mean, random, none = (
        difference(data, "sequence", name)
        for name in ("init-mean", "init-random", "calibration-none")
    )
    return (
        f"A copy of the most selected expert differs from the mean of the base's by {mean}, from a "
        f"random start by {random}; calibration from none by {none}."
    )


def tuning_tables(data: Results) -> str:
    """One for each list of rates that was tried."""
    grids: dict[tuple[str, ...], dict[str, Any]] = {}
    for trains, losses in data["tuning"]["choice_nll"].items():
        grids.setdefault(tuple(losses), {})[trains] = losses
    return "\n\n".join(
        tuning_section({"tuning": data["tuning"] | {"choice_nll": tried}})
        for tried in grids.values()
    )
