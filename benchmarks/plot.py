"""Draws the results of run.py on a CPU.

python benchmarks/plot.py        # out/bench/time.png, overhead.png, decode.png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from lib import result_files
from lib.pages.cpu import overhead_pair
from lib.pages.tables import case_title
from lib.records import compare
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_COLOURS = {
    "bound": "0.6", "read": "0.6", "ours": "tab:blue", "ours_text": "tab:cyan",
    "ours_base": "tab:purple", "ours_added": "tab:olive", "ours_added_text": "tab:brown",
    "block": "tab:purple", "block_added": "tab:olive", "block_added_text": "tab:brown",
    "hf": "tab:orange", "peft": "tab:red", "split": "tab:green",
}  # fmt: skip


_STYLES = {"eager": "s--", "batched_mm": "^:"}


def _colour(provider: str) -> str:
    return _COLOURS.get(provider.partition(":")[0], "tab:gray")


def _ratios(record: Mapping, reference: str, mode: str) -> dict:
    """Statistics of each measured provider's time over the reference's."""
    compared = {name: compare(record, name, reference, mode) for name in record["providers"]}
    return {name: ratio for name, ratio in compared.items() if ratio is not None}


def time_figure(records: Sequence[Mapping]) -> Figure:
    """Draw forward and backward of each provider as a multiple of the expert GEMMs alone."""
    rows = (len(records) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(12, 3.2 * rows), squeeze=False)
    for ax, record in zip(axes.flat, records, strict=False):
        ratios = _ratios(record, "bound", "both")
        names = sorted(ratios, key=lambda name: ratios[name].median, reverse=True)
        medians = [ratios[name].median for name in names]
        errors = [
            [ratios[name].median - ratios[name].p20 for name in names],
            [ratios[name].p80 - ratios[name].median for name in names],
        ]
        ax.barh(names, medians, xerr=errors, color=[_colour(name) for name in names], capsize=2)
        for place, name in enumerate(names):  # beyond the bar: a short one has no room
            ax.annotate(
                f"{ratios[name].median:.2f}", (ratios[name].p80, place), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        ax.margins(x=0.12)
        ax.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
        ax.set_title(case_title(record["case"]), fontsize=10)
        ax.set_xlabel("forward + backward, times the expert GEMMs alone")
    for ax in axes.flat[len(records) :]:
        ax.set_visible(False)
    return figure


def overhead_figure(records: Sequence[Mapping]) -> Figure:
    """Draw the cost of our adapters against image share and rank."""
    base_rank, base_share = records[0]["case"]["r"], 0.5
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for ax, key, chosen, label in (
        (axes[0], "image_share", ("r", base_rank), f"share of image rows (rank {base_rank})"),
        (axes[1], "r", ("image_share", base_share), f"rank ({base_share:.0%} image rows)"),
    ):
        points = [record for record in records if record["case"][chosen[0]] == chosen[1]]
        points.sort(key=lambda record: record["case"][key])
        for mode in ("forward", "backward", "both"):
            known = [
                (record["case"][key], ratio)
                for record in points
                if (ratio := compare(record, *overhead_pair(record), mode)) is not None
            ]
            xs = [x for x, _ in known]
            ax.plot(xs, [100 * (ratio.median - 1) for _, ratio in known], marker="o", label=mode)
            ax.fill_between(
                xs, [100 * (ratio.p20 - 1) for _, ratio in known],
                [100 * (ratio.p80 - 1) for _, ratio in known], alpha=0.15,
            )  # fmt: skip
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set_xlabel(label)
        ax.set_xticks(sorted({record["case"][key] for record in points}))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("adapters' cost over our base (%)")
    axes[1].legend(title="median; band: 20 to 80 %")
    return figure


def decode_figure(records: Sequence[Mapping]) -> Figure:
    """Draw each provider's decoding time as a multiple of one reading of the weights."""
    panels: dict[tuple[str, str], list[Mapping]] = {}
    for record in records:
        panels.setdefault((record["case"]["shape"], record["case"]["dtype"]), []).append(record)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), squeeze=False)
    for ax, (title, members) in zip(axes.flat, panels.items(), strict=True):
        lines: dict[str, list[tuple[int, object]]] = {}
        for record in members:
            for name, ratio in _ratios(record, "read", "decode").items():
                lines.setdefault(name, []).append((record["case"]["T"], ratio))
        for name, points in lines.items():
            medians = [ratio.median for _, ratio in points]
            low = [ratio.median - ratio.p20 for _, ratio in points]
            high = [ratio.p80 - ratio.median for _, ratio in points]
            style = _STYLES.get(name.partition(":")[2], "o-")
            ax.errorbar(
                [tokens for tokens, _ in points], medians, yerr=[low, high], fmt=style,
                capsize=2, color=_colour(name), label=name,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=" ".join(title))
        tokens = sorted({record["case"]["T"] for record in members})
        ax.set_xticks(tokens, [str(count) for count in tokens])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    axes.flat[0].set_ylabel("times one reading of the experts' weights")
    axes.flat[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def draw(results: Mapping, folder: Path) -> list[Path]:
    """Write a file for each figure whose section was measured, and return the paths."""
    balanced = [r for r in results.get("training", ()) if r["case"]["routing"] == "balanced"]
    figures = {
        "time": (time_figure, balanced),
        "overhead": (overhead_figure, results.get("overhead")),
        "decode": (decode_figure, results.get("decode")),
    }
    run = results["environment"]
    title = (
        f"{run['processor']}, {run['threads']} threads, torch {run['versions']['torch']}, "
        f"commit {(run['commit'] or 'unknown')[:7]}{' with changes' if run['dirty'] else ''}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (function, records) in figures.items():
        if records:
            figure = function(records)
            figure.suptitle(title, fontsize=11)
            figure.tight_layout()
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            plt.close(figure)
    return paths


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = result_files.RESULTS / "cpu.json"
    parser.add_argument("--input", type=Path, default=default)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    for path in draw(result_files.read(args.input), args.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
