"""A base model with the adapters of several runs: it draws, chats, and compares its text."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL.Image import Image
from transformers import GenerationConfig, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, PatchedModel
from moe_kernels import load as load_patched
from moe_kernels.imaging import caption_ids, generate_images, load_image_tokenizer
from moe_kernels.imaging.generation import check_positions
from moe_kernels.imaging.tokenizer import ImageTokenizer
from moe_kernels.programs.shared.files import read_json
from moe_kernels.programs.shared.models import load_causal_lm, load_tokenizer
from moe_kernels.programs.shared.options import LARGEST_SEED
from moe_kernels.programs.shared.serving import limits

_FIRST = "default"  # the name that the library gives to the first adapter


class Refused(ValueError):
    """A request that cannot be answered; its text is a sentence for whoever asked."""


class Busy(RuntimeError):
    """Too many requests wait already."""


@dataclass(frozen=True)
class Run:
    """One of the runs that are served.

    name: of its folder, which the page shows; adapter: of its adapter in the patched model
    """

    name: str
    adapter: str
    image_tokenizer: ImageTokenizer
    captions: list[str]


class Left(Exception):
    """Whoever asked does not wait for the answer any more."""


HasLeft = Callable[[], bool]


def _stays() -> bool:
    return False


class Queue:
    """Lets some requests be computed at once, others wait for them, and refuses more."""

    def __init__(self, at_once: int):
        self._places = threading.Semaphore(at_once + limits.WAITING)
        self._computing = threading.Semaphore(at_once)

    @contextmanager
    def place(self, has_left: HasLeft = _stays) -> Iterator[None]:
        """Wait until it is this request's turn.

        Raises:
            Busy: too many wait.
            Left: who asked has left meanwhile.
        """
        if not self._places.acquire(blocking=False):
            raise Busy(f"{limits.WAITING} requests wait already: try again in a moment.")
        try:
            with self._computing:
                if has_left():
                    raise Left("The visitor left before their turn came.")
                yield
        finally:
            self._places.release()


class Studio:
    """Draws and chats with one patched model; any method may run in several threads.

    Each answer depends on its request alone, and not on what else is asked meanwhile. Nothing here
    may therefore change the model.

    Args:
        base: name of the base, for the page
        patched: the base with the adapters of all runs
        tokenizer: the base's, without names of added tokens
        runs: the first one is that of requests which name none
        parameters: number of the base's
    """

    def __init__(
        self, base: str, patched: PatchedModel, tokenizer: PreTrainedTokenizerBase,
        runs: Sequence[Run], parameters: int,
    ):  # fmt: skip
        self.base = base
        self.parameters = parameters
        self.patched = patched
        self.tokenizer = tokenizer
        self.runs = {run.name: run for run in runs}
        self._drawing = Queue(limits.DRAWING)
        self._chatting = Queue(limits.CHATTING)
        self._greedy = _greedy(patched, tokenizer)

    def info(self) -> dict[str, Any]:
        """Return what the page says about the model, its runs and its limits."""
        model = self.patched.model
        trained, _ = self.patched.count_parameters()
        return {
            "base": self.base,
            "model": type(model).__name__,
            "parameters": self.parameters,
            "parameters_of_adapter": trained,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "has_chat_template": self.tokenizer.chat_template is not None,
            "adapters": [
                {"name": run.name, "captions": run.captions} for run in self.runs.values()
            ],
            "limits": {
                "caption": limits.MAX_CAPTION,
                "pictures": limits.MAX_PICTURES,
                "guidance": limits.MAX_GUIDANCE,
                "seed": LARGEST_SEED,
                "message": limits.MAX_MESSAGE,
                "messages": limits.MAX_MESSAGES,
                "tokens": self._max_tokens,
                "new_tokens": limits.MAX_NEW_TOKENS,
            },
        }

    def draw(
        self, caption: str, count: int, guidance: float, seed: int, adapter: str | None,
        has_left: HasLeft = _stays,
    ) -> list[Image]:  # fmt: skip
        """Return pictures of a caption.

        Raises:
            Refused: the caption is too long for the model, or there is no such adapter.
            Busy: too many requests wait.
            Left: who asked has left before anything was drawn.
        """
        run = self._run(adapter)
        # As generate_image_codes counts: a delimiter more, and the last code is not read.
        length = len(caption_ids(self.tokenizer, caption)) + run.image_tokenizer.tokens_per_image
        try:
            check_positions(self.patched.model, length)
        except ValueError as error:
            raise Refused(f"This cannot be drawn: {error}.") from error
        with self._drawing.place(has_left), self.patched.adapter(run.adapter):
            # In one batch, as the pictures of a batch depend on its size.
            return generate_images(
                self.patched.model, [caption] * count, tokenizer=self.tokenizer,
                image_tokenizer=run.image_tokenizer, guidance_scale=guidance, seed=seed,
                batch_size=count,
            )  # fmt: skip

    def chat(
        self, messages: Sequence[dict[str, str]], adapter: str | None, has_left: HasLeft = _stays
    ) -> dict[str, Any]:
        """Return the greedy answer to a conversation, and what its text was compared with.

        Raises:
            Refused: the conversation is too long, the model's template has no place for it, or
                there is no such adapter.
            Busy: too many requests wait.
            Left: who asked has left before anything was computed.
        """
        run = self._run(adapter)
        prompt = self._prompt(messages)
        with self._chatting.place(has_left), self.patched.adapter(run.adapter):
            ids = self.patched.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=self._greedy
            )
            check = self.patched.check_text(ids)
        new = ids[0, prompt.shape[1] :]
        return {
            "text": self.tokenizer.decode(new, skip_special_tokens=True).strip(),
            "is_cut": len(new) == limits.MAX_NEW_TOKENS,
            "check": {
                "tokens": check.tokens,
                "logits": check.tokens * check.vocabulary,
                "tokens_changed_by_adapter": check.changed_by_adapters,
                "tokens_rounded_by_patching": check.changed_by_patching,
                "relative_rms_of_rounding": check.relative_rms,
                "same_next_token": round(check.same_next_token * check.tokens),
            },
        }

    def _run(self, name: str | None) -> Run:
        if name is None:
            return next(iter(self.runs.values()))
        if name not in self.runs:
            raise Refused(f"There is no adapter {name!r}; there are {', '.join(self.runs)}.")
        return self.runs[name]

    @property
    def _max_tokens(self) -> int:
        positions = getattr(self.patched.model.config, "max_position_embeddings", None)
        return min(limits.MAX_TOKENS, positions or limits.MAX_TOKENS)

    def _prompt(self, messages: Sequence[dict[str, str]]) -> torch.Tensor:
        """Return the token ids (1, S) of a conversation; without a template, of its last message.

        Raises:
            Refused: it is empty, too long, or the template refuses it.
        """
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(messages[-1]["content"]).input_ids
        else:
            try:
                ids = self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, return_dict=True
                ).input_ids
            except TemplateError as error:
                raise Refused(f"The model's chat template refuses this: {error}.") from error
        most = self._max_tokens - limits.MAX_NEW_TOKENS
        if not 0 < len(ids) <= most:
            raise Refused(
                f"The conversation has {len(ids):,} tokens, and the model takes 1 to {most:,} "
                "here: clear it, or write less."
            )
        return torch.tensor([ids], device=self.patched.model.device)


def _greedy(patched: PatchedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the model's settings for text, greedy.

    It is whole, as `generate` takes what is not set from the model, where a drawing in another
    thread has other settings for a while.
    """
    config = copy.deepcopy(patched.model.generation_config)
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    unused = {"temperature": None, "top_k": None, "top_p": None, "max_length": None}
    config.update(
        do_sample=False, max_new_tokens=limits.MAX_NEW_TOKENS, eos_token_id=ends,
        pad_token_id=_first(config.pad_token_id, tokenizer.pad_token_id, ends, 0), **unused,
    )  # fmt: skip
    return config


def _first(*ids: int | list[int] | None) -> int:
    """Return the first id that is there, of a list its first."""
    found = next(each for each in ids if each is not None and each != [])
    return found[0] if isinstance(found, list) else found


def load(
    base: str, folders: Sequence[Path], *, dtype: str, device: str, backend: str | None
) -> Studio:
    """Load a base and the runs of `train-text-to-image` that were trained on it.

    Files of the runs are looked at first, so that none that is missing costs the loading of a base.

    Raises:
        ValueError: two runs have the same name, an adapter does not fit the base or the first run's
            adapter, or a file is damaged.
        OSError: a file is missing, or there is no such base.
    """
    runs = [_read_run(number, folder) for number, folder in enumerate(folders)]
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"--run has two folders of the name {sorted(twice)[0]}, by which the page tells them "
            "apart: rename one"
        )
    model = load_causal_lm(base, dtype, device)
    parameters = model.num_parameters()
    # The tokenizer does not learn the names of added tokens: a visitor's text has none of them.
    patched = load_patched(model, folders[0] / "adapter", backend=backend)
    for run, folder in zip(runs[1:], folders[1:], strict=True):
        patched.load_adapter(folder / "adapter", adapter=run.adapter)
    return Studio(_name_of(base), patched, load_tokenizer(base), runs, parameters)


def _name_of(base: str) -> str:
    """Return the name of a base's folder, or of what moe-kernels convert made it of."""
    folder = Path(base)
    report = folder.parent / "report.json"
    if folder.name != "model" or not report.is_file():
        return folder.name or base
    found = read_json(report)
    if not isinstance(found, dict) or "conversions" not in found:  # of another program
        return folder.name
    settings = found["settings"]
    dense = settings["gguf_file"] or Path(settings["model"]).name
    return f"{dense} as a Mixture of Experts"


def _read_run(number: int, folder: Path) -> Run:
    ModalityLoraConfig.from_adapter(folder / "adapter")  # it is there, and is not damaged
    report = folder / "report.json"
    captions = read_json(report).get("captions", []) if report.is_file() else []
    return Run(
        name=folder.resolve().name,
        adapter=f"run_{number}" if number else _FIRST,
        image_tokenizer=load_image_tokenizer(folder / "image_tokenizer"),
        captions=captions,
    )
