"""Measure peak bytes and seconds of a long video in a model: alone, with a memory, and encoded in pieces.

`python -m benchmarks.attach_memory` runs each in a process of its own and prints a table; `--device cuda --large` takes
a model of the shape of Qwen2.5-VL-7B with random weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SMALL = {
    "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "vision": {"hidden_size": 128, "intermediate_size": 256, "depth": 4, "num_heads": 4, "out_hidden_size": 256,
               "fullatt_block_indexes": [3]},
    "rope": [8, 12, 12], "ids": 990,
}  # fmt: skip
LARGE = {
    "text": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
             "num_key_value_heads": 4, "vocab_size": 152064},
    "vision": {"out_hidden_size": 3584}, "rope": [16, 24, 24], "ids": 151650,
}  # fmt: skip
WAYS: dict[str, dict[str, Any] | None] = {
    "the model alone": None,
    "with a memory": {"memory_capacities": [24, 24, 144]},
    "with a memory, 16 frames at a time": {"memory_capacities": [24, 24, 144], "memory_chunk_frames": 16},
}


def build(shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    import transformers

    first = shape["ids"]
    ids = {
        "image_token_id": first, "video_token_id": first + 1, "vision_start_token_id": first + 2,
        "vision_end_token_id": first + 3,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": shape["rope"], "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**shape["text"], "rope_parameters": rope, "max_position_embeddings": 131072},
        vision_config={"tokens_per_second": 2, **shape["vision"]}, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()


def video(model: Any, frames: int, side: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return a prompt with a synthetic film of `frames` frames, `side` × `side` tokens each."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    pairs, patches = frames // 2, 2 * side
    rows, width = pairs * patches**2, 3 * 2 * config.vision_config.patch_size**2
    still = torch.randn(patches**2, width, generator=draw)
    drift = 0.1 * torch.randn(pairs, 1, width, generator=draw).cumsum(0)
    pixels = (still + drift).reshape(rows, width)
    run = torch.full((pairs * side**2,), config.video_token_id)
    words = torch.arange(10, 30)
    ids = torch.cat([words, torch.tensor([config.vision_start_token_id]), run,
                     torch.tensor([config.vision_end_token_id]), words])[None]  # fmt: skip
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels.to(dtype),
        "video_grid_thw": torch.tensor([[pairs, patches, patches]]), "second_per_grid_ts": torch.ones(1),
        "mm_token_type_ids": (ids == config.video_token_id).int() * 2,
    }  # fmt: skip
    return {name: x.to(device) for name, x in inputs.items()}


def run(way: str, frames: int, device: str, large: bool, new: int) -> dict[str, Any]:
    """Measure one way in this process: bytes beyond model and inputs, seconds to the first token and per token."""
    from vmemory import attach

    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    model = build(LARGE if large else SMALL, device, dtype)
    inputs = video(model, frames, 4, device, dtype)
    if WAYS[way] is not None:
        attach(model, config=WAYS[way])

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    if gpu:
        # making the model may have needed more bytes than it occupies now
        torch.cuda.reset_peak_memory_stats()

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    before, started, came = peak(), now(), Arrivals(now)
    model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=came)
    first, *_, last = came.times
    return {"way": way, "peak": peak() - before, "first": first - started, "tokens_per_s": (new - 1) / (last - first)}


class Arrivals:
    """A streamer that records the time of each token; the prompt comes first and does not count."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.times: list[float] = []
        self._now, self._prompt = now, True

    def put(self, _: torch.Tensor) -> None:
        if not self._prompt:
            self.times.append(self._now())
        self._prompt = False

    def end(self) -> None:
        """Do nothing: `generate` calls this at the end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--new", type=int, default=33)
    parser.add_argument("--way", choices=list(WAYS))
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run(options.way, options.frames, options.device, options.large, options.new)))
        return
    print(f"| {options.frames} frames of 16 tokens a pair | peak beyond model and inputs | first token | tokens/s |")
    print("|---|---:|---:|---:|")
    failed = 0
    for way in WAYS:
        child = [sys.executable, "-m", "benchmarks.attach_memory", *sys.argv[1:], "--way", way]
        # an error is printed and must not stop the other ways
        done = subprocess.run(child, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed += 1
            print(f"| {way} | failed | | |", flush=True)
            continue
        out = json.loads(done.stdout.splitlines()[-1])
        row = f"{out['peak'] / 2**20:.0f} MiB | {out['first']:.2f} s | {out['tokens_per_s']:.1f}"
        print(f"| {way} | {row} |", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
