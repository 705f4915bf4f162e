"""Write docs/results/drawing.md out of reports of the programs: a base, and what it learnt to draw.

    python python/drawing.py --convert BASE/report.json MORE/report.json \\
        --digits DIGITS/report.json --emoji EMOJI/report.json
    python python/drawing.py              # write the page again, from docs/results/drawing.json

`make draw` makes such reports, under out/draw: in base, digits and emoji. The page's prose stands
in docs/results/drawing.md, between markers that this program fills; sheets of pictures and films
are copied out of the folders of the reports.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from studies import drawing, report
from studies.sweep import PAGES

from moe_kernels.programs.shared.cli import Options, console, exit_code, option, parse
from moe_kernels.programs.shared.files import read_json, write_json, write_text


@dataclass(kw_only=True)
class PageOptions(Options):
    """Reports."""

    convert: list[Path] = option(
        [], "report.json of moe-kernels convert, that of the base first", metavar="FILE",
        is_file=True,
    )  # fmt: skip
    digits: Path | None = option(
        None, "report.json of a run on coloured digits", metavar="FILE",
        is_file=True,
    )  # fmt: skip
    emoji: Path | None = option(None, "report.json of a run on emoji", metavar="FILE", is_file=True)
    results: Path = option(PAGES, "folder of the JSON, the page and its pictures", is_folder=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [bool(self.convert), self.digits is not None, self.emoji is not None]
        if any(given) and not all(given):
            raise ValueError("give --convert, --digits and --emoji together, or none of them")


def run(options: PageOptions) -> None:
    file = options.results / "drawing.json"
    if options.convert:
        runs = {"digits": options.digits, "emoji": options.emoji}
        write_json(file, drawing.read_reports(options.convert, runs))
        drawing.copy_sheets(runs, options.results)
    prose = (PAGES / "drawing.md").read_text(encoding="utf-8")
    page = report.fill(prose, read_json(file), drawing.BLOCKS)
    write_text(options.results / "drawing.md", page)
    console.print(f"written to {options.results}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse(PageOptions, arguments, __doc__)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
