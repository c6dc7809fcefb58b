"""A tokenizer for tiny checkpoints: one token a character."""

import string

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

__all__ = ["letters"]


def letters() -> PreTrainedTokenizerFast:
    """Letters, digits and a space, below the vocabulary of `support.checkpoints`."""
    characters = string.ascii_letters + string.digits + " .?"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i for i, c in enumerate(characters, 4)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
