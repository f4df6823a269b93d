"""Measure how many changes have a key frame near them: `python -m benchmarks.key_frames`.

Streams are drawn by `vmemory.data.world` at 4 frames a second. A change is a card that comes, or a cut to another
place. It is found if a key frame lies at most 3 frames before or behind it.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec

import numpy as np

from vmemory.data.world import World
from vmemory.sources import Frame, KeyFrames

FPS, NEAR = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=300)
    arguments = parser.parse_args()
    streams = []
    for seed in range(arguments.worlds):
        world = World(seed, arguments.seconds, split="test", pace=4.0)
        at = np.arange(arguments.seconds * FPS) / FPS
        cuts = np.flatnonzero(np.diff(world.place)) + 1
        changes = {card.start * FPS for card in world.cards if card.start} | {int(cut) * FPS for cut in cuts}
        frames = [Frame(image, t, i) for i, (image, t) in enumerate(zip(world.render(at), at.tolist(), strict=True))]
        streams.append((frames, sorted(changes)))
    total = sum(len(changes) for _, changes in streams)
    print(f"{total} changes in {sum(len(frames) for frames, _ in streams)} frames\n")
    print("| asked for | rule | taken | changes found | CPU µs a frame |\n|---:|---|---:|---:|---:|")
    for share in (0.05, 0.1, 0.2):
        for rule in ("difference", "flow", "every"):
            if rule == "flow" and not find_spec("cv2"):
                continue
            begin, taken, found = time.process_time(), 0, 0
            for frames, changes in streams:
                keys = np.array([frame.index for frame in KeyFrames(frames, rule, share=share)])  # type: ignore[arg-type]
                taken += len(keys)
                found += sum(bool((np.abs(keys - change) <= NEAR).any()) for change in changes)
            count = sum(len(frames) for frames, _ in streams)
            spent = (time.process_time() - begin) / count * 1e6
            print(f"| {share:.0%} | `{rule}` | {taken / count:.1%} | {found / total:.2f} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
