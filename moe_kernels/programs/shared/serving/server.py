"""Starting the server: packages and port are looked at first, then the model is loaded."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from moe_kernels import extras
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.serving import studio

USER = "moe-kernels draw --serve"
LOOPBACK = ["127.0.0.1", "localhost"]


def serve(
    base: str, runs: Sequence[Path], *, host: str, port: int, dtype: str, device: str,
    backend: str | None,
) -> None:  # fmt: skip
    """Serve a page that draws with runs of `train-text-to-image`, until the process is stopped.

    Args:
        base: local folder or hub id of the model that was taught
        runs: folders, each with adapter/ and image_tokenizer/
        port: 0 for any that is free
        dtype, device, backend: as in the other programs

    Raises:
        ImportError: the extra `serve` is not installed.
        ValueError: the runs do not fit the base or each other, or a file is damaged.
        OSError: the port is taken, a file is missing, or there is no such base.
    """
    uvicorn = check_packages()
    with bind(host, port) as listening:
        console.print(f"loading {base}", markup=False)
        loaded = studio.load(base, runs, dtype=dtype, device=device, backend=backend)
        # By its name, as it imports what may be missing.
        app = import_module("moe_kernels.programs.shared.serving.app").make_app(
            loaded, hosts=LOOPBACK if host in LOOPBACK else ["*"]
        )
        console.print(f"open {address_of(listening)} in a browser; Ctrl-C stops", markup=False)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
        with contextlib.suppress(
            KeyboardInterrupt
        ):  # the way to stop it, and nothing to go on with
            uvicorn.Server(settings).run([listening])


def check_server(host: str, port: int) -> None:
    """Raise, before work of hours, what :func:`serve` would raise: packages, and the port."""
    check_packages()
    bind(host, port).close()


def check_packages() -> ModuleType:
    """Return uvicorn; raise ImportError unless the extra `serve` is installed."""
    uvicorn, _ = (extras.load(name, USER) for name in ("uvicorn", "fastapi"))
    return uvicorn


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: the address cannot be used; says what to do.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port} cannot be used: {error.strerror}; give others (--port 0 "
            "takes one that is free)"
        ) from error


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
