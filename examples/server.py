"""Serve a base with several adapters: each request names its own, and text needs none.

    pip install fastapi uvicorn
    python examples/server.py BASE ADAPTER sketches=ADAPTER photos=ADAPTER
    curl localhost:8000/generate -H "content-type: application/json" \\
        -d '{"prompt": "a red apple", "adapter": "sketches", "added_tokens": true}'

The first adapter is "default", and "base" is none: the text model, whose answers keep their bits.
"""

import sys

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_kernels import PatchedModel, load


class Request(BaseModel):
    """Prompt, the adapter whose answer is wanted, and whether it may have added tokens."""

    prompt: str = Field(min_length=1)
    adapter: str = "base"
    added_tokens: bool = False
    max_new_tokens: int = Field(32, ge=1, le=4096)


def make_app(patched: PatchedModel, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """Return the app, which runs each request in a thread of its own."""
    app = FastAPI()

    @app.post("/generate")
    def generate(request: Request) -> dict:
        if request.adapter not in ("base", *patched.adapter_names):
            raise HTTPException(422, f"adapters: base, {', '.join(patched.adapter_names)}")
        inputs = tokenizer(request.prompt, return_tensors="pt").to(patched.model.device)
        settings = {"max_new_tokens": request.max_new_tokens, "do_sample": False}
        settings |= {"suppress_tokens": []} if request.added_tokens else {}
        answer = patched.model.generate(**inputs, adapter=request.adapter, **settings)
        new = answer[0, inputs.input_ids.shape[1] :]
        return {"token_ids": new.tolist(), "text": tokenizer.decode(new)}

    return app


if __name__ == "__main__":
    base, default, *named = sys.argv[1:] if len(sys.argv) > 2 else sys.exit(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(base)
    patched = load(base, default, tokenizer)
    for each in named:
        patched.load_adapter(each.partition("=")[2], adapter=each.partition("=")[0])
    uvicorn.run(make_app(patched, tokenizer), port=8000)
