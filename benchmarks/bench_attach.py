"""Time the cost of an attached memory without the tower: shrinking a prompt of 4,096 visual tokens, attach, detach."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5.18")

from tests.tiny_vlms import tiny
from vmemory import attach
from vmemory.models import prompt

FRAMES, SETTINGS = 256, {"memory_capacities": [24, 24, 144]}


@torch.no_grad()
@pytest.mark.benchmark(group="a prompt of 256 frames × 16 tokens shrinks")
@pytest.mark.parametrize("family", ["video_llama_3", "qwen2_5_vl", "llava_onevision", "qwen3_vl"])
def test_rewrite(measure, family):
    model, inputs = tiny(family, T=FRAMES)
    with attach(model, config=SETTINGS) as handle:
        adapter = copy.copy(handle._prompts.adapter)
        encoded = adapter.encode(model, inputs)
        # tower, memory and the model's own positions are measured in other benchmarks
        kept = [handle._prompts.compress_clip(clip) for clip in encoded.clips]
        located = adapter.positions(model, inputs)
        adapter.encode = lambda *_: encoded
        adapter.positions = lambda *_: located

        def ours(ids):
            left = iter(kept)

            def held(*_):
                return next(left)

            with mock.patch.object(prompt, "compress_video", held):
                given = {**inputs, "input_ids": ids}
                return prompt.compress_prompt(model, adapter, given, handle.config, None, generating=True)

        length = inputs["input_ids"].numel()
        whole = ours(inputs["input_ids"]).inputs
        assert whole["input_ids"].numel() == int(handle._prompts.compress_prompt(dict(inputs), True).keep.sum())
        # ids, mask, types and three rows of positions in and out, as int64
        measure(f"{family}, {length} tokens", ours, lambda: inputs["input_ids"], 8 * 6 * 2 * length, 0)


@pytest.mark.benchmark(group="attach and detach")
def test_attach(measure):
    import transformers

    with torch.device("meta"):
        config = transformers.Qwen2_5_VLConfig(text_config={
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        })  # fmt: skip
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) > 7e9

    def ours(_):
        attach(model, config=SETTINGS).detach()

    measure("7B parameters, hierarchical", ours, lambda: torch.zeros(1), 1, 0)
