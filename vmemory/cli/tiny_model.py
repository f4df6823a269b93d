"""A small video language model with a real architecture and random weights."""

from __future__ import annotations

import math
import time as clock
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmemory.session import VideoSession
from vmemory.sources import FrameSource

# capacities of the three tiers
TIERS = (4, 4, 8)


class Chatted(NamedTuple):
    """Results of a stream in a model: frames, visual tokens before and after compression, the answer."""

    frames: int
    tokens: int
    held: int
    encoding: float
    asking: float
    question: str
    answer: str


def tiny_model() -> tuple[Any, Any]:
    """Make a Qwen2.5-VL with random weights, and a byte tokenizer with a chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ("<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*letters, *marks])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=marks[0], pad_token=marks[0],
        chat_template="{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
        "{% else %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}",
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[1:])})
    image, video, start, end = range(len(letters) + 1, len(letters) + 5)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
            "fullatt_block_indexes": [1],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return model.eval(), tokenizer


def chatted(video: Path, question: str = "What happens?") -> Chatted:
    """Push a video into a tiny model's memory at two frames per second, and ask a question."""
    model, tokenizer = tiny_model()
    session = VideoSession(model, tokenizer, config={"memory_capacities": TIERS}, fps=2.0, frame_tokens=64)
    started, frames = clock.perf_counter(), 0
    for frame in FrameSource(video, 2.0, size=224):
        session.push([frame])
        frames += 1
    watched = clock.perf_counter()
    answer = "".join(session.stream_generate(question, max_new_tokens=24, do_sample=False))
    assert session.memory is not None
    tokens = session.memory.counts()["seen"] * math.prod(session.memory.to_dict()["grid"])
    seconds = (watched - started, clock.perf_counter() - watched)
    return Chatted(frames, tokens, session.num_tokens, *seconds, question, answer)


def chat_text(chat: Chatted) -> str:
    """Return the results as two lines of text."""
    return (
        f"a tiny Qwen2.5-VL watched {chat.frames} frames of the trailer in {chat.encoding:.1f} s: {chat.tokens} visual "
        f"tokens became {chat.held}\n{chat.question!r}: {chat.answer!r} after {1e3 * chat.asking:.0f} ms "
        "(its weights are random, and so are its words)"
    )
