"""Drawings of moe-kernels train-text-to-image, and its table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from moe_kernels import imaging
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.drawing import PictureTokens
from moe_kernels.programs.shared.pictures import spread
from moe_kernels.programs.shared.tables import print_rows, text_rows


def plot_drawings(
    codes: list[list[int]], samples: dict[str, Any], labels: Sequence[int], tokens: PictureTokens,
    title: str, *, real: int = 3, nearest: bool = False, shown: Sequence[int] | None = None,
) -> Figure:  # fmt: skip
    """Return a figure with a row for each caption: drawings, and real pictures beside them.

    Args:
        codes: of the drawings
        samples: what was measured of them; misread drawings get a red frame
        labels: numbers of the captions that were drawn, each equally often
        real: number of real pictures, held-out ones where there are any
        nearest: show the nearest training picture of each drawing too
        shown: the captions that get a row, some of ``labels``; None: all
    """
    decode, each = tokens.tokenizer.decode, len(codes) // len(labels)
    drawn = decode(torch.tensor(codes))
    if nearest:
        trained = decode(tokens.train.codes[samples["nearest"]])
    rows, all_held_out = [], True
    for number, label in enumerate(labels):
        if shown is not None and label not in shown:
            continue
        mine = slice(number * each, (number + 1) * each)
        real_codes, is_held_out = _real_pictures(tokens, label, real)
        all_held_out &= is_held_out
        rows.append(imaging.SampleRow(
            f'"{tokens.captions[label]}"', drawn[mine], decode(real_codes),
            torch.tensor(samples["read"][mine]) != label if "read" in samples else None,
            trained[mine] if nearest else None,
        ))  # fmt: skip
    heading = "real, held out" if all_held_out else "real"
    return imaging.plot_samples(rows, title, real_heading=heading, through_tokenizer=True)


def plot_reconstruction(
    tokens: PictureTokens, labels: Sequence[int], *, real: int = 4, rows: int = 12
) -> Figure | None:
    """Return a figure of held-out pictures beside what the image tokenizer makes of them.

    Returns None if none of the captions ``labels`` has a held-out picture.
    """
    decode, held_out = tokens.tokenizer.decode, tokens.held_out
    found = [mine for label in labels if (mine := np.flatnonzero(held_out.labels == label)).size]
    if not found:
        return None
    return imaging.plot_samples(
        [
            imaging.SampleRow(
                f'"{tokens.captions[held_out.labels[mine[0]]]}"',
                decode(held_out.codes[mine[:real]]), held_out.pictures.images[mine[:real]],
            )
            for mine in spread(found, rows)
        ],
        f"{tokens.tokenizer.num_codes} codes, {tokens.tokenizer.tokens_per_image} tokens a picture",
        heading="through the tokenizer",
    )  # fmt: skip


def plot_failures(
    codes: list[list[int]], samples: dict[str, Any], asked: Sequence[int], tokens: PictureTokens,
    title: str, *, rows: int = 24,
) -> Figure | None:  # fmt: skip
    """Return a figure of drawings that were read as another caption; None if there is none.

    Args:
        codes: of the drawings
        samples: what was measured of them, by a reader
        asked: the caption's number of each drawing
        rows: the most that are shown
    """
    pairs = zip(asked, samples["read"], strict=True)
    wrong = [number for number, (label, read) in enumerate(pairs) if label != read]
    if not wrong:
        return None
    decode, captions = tokens.tokenizer.decode, tokens.captions
    shown = []
    for number in spread(wrong, rows):
        label, read = asked[number], samples["read"][number]
        nearest = tokens.train.codes[samples["nearest"][number]]
        shown.append(imaging.SampleRow(
            f"{captions[label]}; read: {captions[read]}", decode(torch.tensor([codes[number]])),
            decode(_real_pictures(tokens, label, 3)[0]), nearest=decode(nearest[None]),
        ))  # fmt: skip
    title += f": {len(wrong)} of {len(asked)} read as another caption"
    return imaging.plot_samples(shown, title, real_heading="real", through_tokenizer=True)


def _real_pictures(tokens: PictureTokens, label: int, count: int) -> tuple[torch.Tensor, bool]:
    """Return codes of real pictures of a caption, and whether they are held-out ones.

    There are none of a held-out caption where few pictures are held out.
    """
    for part in (tokens.held_out, tokens.train):
        if (mine := np.flatnonzero(part.labels == label)).size:
            return part.codes[torch.from_numpy(mine[:count])], part is tokens.held_out
    return tokens.held_out.codes[:0], True


def training_rows(report: dict[str, Any]) -> dict[str, str]:
    """Return table rows of what training did to text and to held-out pictures."""
    parameters, image = report["parameters"], report["image"]
    return {
        "parameters trained": f"{parameters['trained']:,} ({parameters['share']:.2%})",
        **text_rows(report["text"]),
        "image, held out: nats a token":
        f"{image['nll_start']:.3f} before, {image['nll_end']:.3f} after, "
        f"{image['nll_adapters_off']:.3f} with the adapters off",
    }  # fmt: skip


def _read_apart(samples: dict[str, Any]) -> str:
    """Return what is read right of held-out captions, and of each attribute."""
    groups = samples.get("read_right", {})
    if len(groups) == 1 and all(len(kinds) == 1 for kinds in groups.values()):
        return ""
    parts = [
        f"{group.replace('_', ' ')}: "
        + " ".join(f"{kind} {each['share']:.1%}" for kind, each in kinds.items())
        for group, kinds in groups.items()
    ]
    return "".join(f"{part}, " for part in parts)


def summarize(report: dict[str, Any], out: Path) -> None:
    """Print a table of the results."""
    rows = training_rows(report)
    for guidance, samples in report["samples"].items():
        near = samples["nearest_training_distance"]
        read = samples.get("read_as_their_caption")
        reads = f"{read:.1%} read as their caption, " if read is not None else ""
        rows[f"pictures, guidance {guidance}"] = (
            f"{reads}{_read_apart(samples)}{samples['distinct']} of {samples['count']} distinct, "
            f"nearest training picture at {near['generated']:.2f} "
            f"(held-out real {near['held_out_real']:.2f})"
        )
    print_rows(rows)
    console.print(f"written to {out}", markup=False, soft_wrap=True)
