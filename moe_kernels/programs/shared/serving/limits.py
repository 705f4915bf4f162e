"""Limits of a request, so that no visitor exhausts the memory; the page knows them."""

MAX_CAPTION = 300  # characters
MAX_PICTURES = 16
MAX_GUIDANCE = 20
MAX_MESSAGE = 2_000  # characters
MAX_MESSAGES = 64
MAX_TOKENS = 1_024  # of a conversation and its answer; their logits are in memory three times
MAX_NEW_TOKENS = 128
MAX_BODY = 2**20  # bytes of a request

# Requests that are computed at once, and those that wait for them. All take fewer threads than
# Starlette has (40). Pictures are drawn one request at a time, as `generate_images` does anyway.
DRAWING, CHATTING, WAITING = 1, 2, 8
