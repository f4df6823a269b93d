"""Measure how many questions a reduced graph still answers: `python -m benchmarks.graph_reduction`.

Synthetic. A memory is a scene: 16 patches of 64 channels, each one of 40 things, seen in four noisy frames in which one
patch moves. `mean` holds the mean of the frames, `nearest` the frame most similar to it. A question is about a memory
that is drawn by Zipf's law, as the earlier searches were, and half of all memories have a twin (the same fact seen
again). Kinds: `text`, any memory of the fact is found; `patch`, the thing at a patch that stood still, of the memory
that was found; `mover`, the thing that moved, which the mean blurs. An answer is right if the nearest of the 40
prototypes is.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from vmemory.graph import MemoryGraph

PATCHES, CHANNELS, THINGS, FRAMES, DIM, NOISE = 16, 64, 40, 4, 64, 3.0
KINDS = ("text", "patch", "mover")
SHARES = (0.6, 0.25, 0.15)


class Scenes:
    """Memories with known contents, and questions about them."""

    def __init__(self, facts: int, seed: int) -> None:
        draw = np.random.RandomState(seed)
        self.things = draw.randn(THINGS, CHANNELS).astype(np.float32)
        self.fact = np.concatenate([np.arange(facts), draw.permutation(facts)[: facts // 2]])
        self.vector = draw.randn(facts, DIM).astype(np.float32)
        count = len(self.fact)
        self.what = draw.randint(THINGS, size=(count, PATCHES))
        self.mover = draw.randint(THINGS, size=count)
        self.place = draw.randint(PATCHES, size=count)
        self.mean, self.nearest = np.empty((2, count, PATCHES, CHANNELS), np.float32)
        for i in range(count):
            frames = self.things[self.what[i]][None].repeat(FRAMES, 0)
            where = draw.permutation(PATCHES)[:FRAMES]
            frames[np.arange(FRAMES), where] = self.things[self.mover[i]]
            frames += NOISE * draw.randn(*frames.shape).astype(np.float32)
            self.mean[i] = frames.mean(0)
            likeness = torch.cosine_similarity(torch.from_numpy(frames), torch.from_numpy(self.mean[i])[None], dim=-1)
            best = int(likeness.mean(-1).argmax())
            self.nearest[i] = frames[best]
            self.place[i] = where[best]
        weight = 1 / np.arange(1, facts + 1)
        self.popular = draw.permutation(weight / weight.sum())

    def ask(self, count: int, draw: np.random.RandomState) -> list[tuple[int, str]]:
        """Draw questions: a fact and a kind each."""
        facts = draw.choice(len(self.popular), count, p=self.popular)
        return list(zip(facts.tolist(), draw.choice(KINDS, count, p=SHARES).tolist(), strict=True))

    def graph(self, searches: int, seed: int) -> MemoryGraph:
        """Store all memories, and search as often as a user has before."""
        graph, draw = MemoryGraph(dim=DIM), np.random.RandomState(seed)
        with graph.batch():
            for i, fact in enumerate(self.fact):
                graph.add(
                    "I", "see", f"scene {fact}", "places", f"scene {fact} as I saw it at that moment", time=float(i),
                    vector=self.vector[fact], mean=torch.from_numpy(self.mean[i]).half(),
                    nearest=torch.from_numpy(self.nearest[i]).half(),
                )  # fmt: skip
        for fact, _ in self.ask(searches, draw):
            graph.search(self.query(fact, draw), 1, walk=0, distinct=False)
        return graph

    def query(self, fact: int, draw: np.random.RandomState) -> np.ndarray:
        """Return the vector of a question, near that of its fact."""
        return self.vector[fact] + 0.7 * draw.randn(DIM).astype(np.float32)

    def answered(self, graph: MemoryGraph, fact: int, kind: str, draw: np.random.RandomState) -> bool:
        """Ask a question, and compare the answer with the truth."""
        found = [entry.memory for entry in graph.search(self.query(fact, draw), 2, walk=0, distinct=False)]
        found = [memory for memory in found if self.fact[memory.id - 1] == fact and memory.caption]
        if kind == "text" or not found:
            return bool(found)
        # of the memories of the fact, the one that still has pictures
        memory = max(found, key=lambda memory: len(memory.kept))
        i = memory.id - 1
        tokens = graph.visual(memory.id, "nearest" if kind == "mover" or "mean" not in memory.kept else "mean")
        tokens = graph.visual(memory.id, "mean") if tokens is None else tokens
        if tokens is None:
            return False
        patch = self.place[i] if kind == "mover" else draw.randint(PATCHES)
        wanted = self.mover[i] if kind == "mover" else self.what[i, patch]
        return bool((self.things @ tokens[patch].float().numpy()).argmax() == wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=300)
    parser.add_argument("--searches", type=int, default=600, help="searches before the reduction")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shares = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
    print("| rule | " + " | ".join(f"{share:.0%}" for share in shares) + " |\n|---|" + "---:|" * len(shares))
    worlds = [Scenes(arguments.facts, seed) for seed in range(arguments.seeds)]
    for rule in ("value", "nsbg", "gsbn"):
        line = []
        for share in shares:
            right = 0
            for seed, scenes in enumerate(worlds):
                graph = scenes.graph(arguments.searches, 10 + seed)
                graph.reduce(int((1 - share) * sum(graph.stats().nbytes.values())), rule=rule)
                draw = np.random.RandomState(20 + seed)
                right += sum(scenes.answered(graph, *asked, draw) for asked in scenes.ask(arguments.questions, draw))
            line.append(right / arguments.questions / len(worlds))
        print(f"| `{rule}` | " + " | ".join(f"{x:.3f}" for x in line) + " |", flush=True)


if __name__ == "__main__":
    main()
