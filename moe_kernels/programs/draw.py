"""Draw in the browser, beside a chat whose text is the base's to the bit.

    moe-kernels draw --serve --base out/smollm2/model --run out/smollm2-digits
    moe-kernels draw --serve --base MODEL --run out/digits out/shapes --port 8080

--base is the model that was taught: a local folder or a hub id. --run names folders that
moe-kernels train-text-to-image has written; each is an adapter that the page lets one choose. They
must have been trained on this base with the same options of adapters and number of codes.
Pictures into a folder, without a server: moe-kernels generate-images.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from moe_kernels.programs.shared.cli import Options, exit_code, option, parse
from moe_kernels.programs.shared.options import ModelOptions
from moe_kernels.programs.shared.serving.server import serve


@dataclass(kw_only=True)
class ServerOptions(Options):
    """Server."""

    serve: bool = option(False, "serve the page until Ctrl-C")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0: any that is free", at_least=0, at_most=65535)


@dataclass(kw_only=True)
class DrawOptions(ServerOptions, ModelOptions):
    """Model and runs."""

    base: str = option(MISSING, "local folder or hub id of the model that was taught")
    run: list[Path] = option(
        MISSING, "--out of moe-kernels train-text-to-image", is_folder=True, nargs="+"
    )
    # Nothing is written, and each request has a seed of its own.
    out: Path = Path()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.serve:
            raise ValueError(
                "give --serve; without a page, moe-kernels generate-images draws into a folder"
            )


def run(options: DrawOptions) -> None:
    serve(
        options.base, options.run, host=options.host, port=options.port,
        **options.pick("dtype", "device", "backend"),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(DrawOptions, arguments, __doc__, prog="moe-kernels draw")
    return exit_code(lambda: run(options))
