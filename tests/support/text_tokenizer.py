"""Text tokenizers of few words."""

import tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "a", "red", "cat", "dog"]


def make_tokenizer(template="$A", **special):
    """Return a tokenizer with a token per word; ``template`` sets the special tokens it adds."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make_sized_tokenizer(size, ids=None):
    """Return a tokenizer of ``size`` words, or of words with the given ids."""
    words = {"<pad>": 0} | {f"w{i}": i for i in (ids or range(1, size))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
