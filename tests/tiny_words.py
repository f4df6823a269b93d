"""A tokenizer for the tiny models, made on the spot."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny_vlms import IMAGE, VIDEO, VISION_END, VISION_START

TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% elif c.type == 'image' %}<image>{% else %}<|video_pad|>{% endif %}{% endfor %}{% endfor %}"
)


def byte_words() -> transformers.PreTrainedTokenizerFast:
    """Bytes, and the special tokens of the tiny models at their ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:189]
    vocabulary = {"<|pad|>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    special = {IMAGE: "<image>", VIDEO: "<|video_pad|>", VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
    vocabulary |= {name: i for i, name in special.items()} | {f"<{i}>": i for i in range(194, 200)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == VIDEO
    return tokenizer
