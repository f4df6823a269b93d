"""Measure the quality of a language model with a bounded cache, per policy: `python -m benchmarks.kv_quality`.

Each text is read once with the full cache and once with every memory. Only tokens after the first eviction count.
Writes JSON and Markdown after every text.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.conftest import processor
from benchmarks.smollm2 import load, texts
from vmemory import __version__
from vmemory.kv import KVMemory
from vmemory.kv.cache import new_cache

MAIN = ("recent", "attention")
OTHERS = ("keys", "reservoir", "uniform", "similar", "hierarchical")
ROOT = Path(__file__).parent.parent


@cache
def _loaded() -> tuple[Any, Any]:
    transformers.logging.disable_progress_bar()
    return load()


class Score:
    """Sums over the tokens of a text after a memory's first eviction."""

    def __init__(self) -> None:
        self.tokens = self.agree = 0
        self.loss = self.full_loss = self.divergence = 0.0

    def add(self, logits: Tensor, full: Tensor, truth: Tensor) -> None:
        """Add log-probabilities `[N, V]` of memory and full cache, and the true next tokens `[N]`."""
        self.tokens += len(truth)
        self.agree += int((logits.argmax(-1) == full.argmax(-1)).sum())
        self.loss -= float(logits.gather(1, truth[:, None]).sum())
        self.full_loss -= float(full.gather(1, truth[:, None]).sum())
        self.divergence += float(torch.nn.functional.kl_div(logits, full, reduction="sum", log_target=True))


@torch.inference_mode()
def measure(name: str, length: int, share: float, policies: Sequence[str], chunk: int) -> list[dict[str, Any]]:
    """Score one text with several memories of the same budget."""
    model, tokenizer = _loaded()
    text = next(t for t in texts() if t.name == name)
    ids = torch.tensor([tokenizer(text.text).input_ids[:length]])
    whole = new_cache(model)
    memories = {policy: KVMemory(round(share * length), policy) for policy in policies}
    caches = {policy: new_cache(model) for policy in policies}
    scores = {policy: Score() for policy in policies}
    for start in range(0, length, chunk):
        part = ids[:, start : start + chunk]
        truth = ids[0, start + 1 : start + chunk + 1]
        at = torch.arange(start, start + part.shape[1])[None]
        full = model(input_ids=part, position_ids=at, past_key_values=whole, use_cache=True).logits[0]
        full = full[: len(truth)].log_softmax(-1)
        for policy, memory in memories.items():
            forgetful = memory.seen > memory.budget
            step = memory.prefill(model, part, position_ids=at, cache=caches[policy], chunk=chunk)
            if forgetful:
                scores[policy].add(step.output.logits[0, : len(truth)].log_softmax(-1), full, truth)
    return [
        {
            "text": name, "version": text.version, "sha256": text.sha256, "policy": policy, "share": share,
            "budget": memories[policy].budget, "rows": memories[policy].token.shape[3],
            "tokens": score.tokens, "agreement": score.agree / score.tokens, "loss": score.loss / score.tokens,
            "full_loss": score.full_loss / score.tokens, "divergence": score.divergence / score.tokens,
        }
        for policy, score in scores.items()
    ]  # fmt: skip


def _select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def table(results: dict[str, Any]) -> str:
    """Return the run as Markdown."""
    info, rows = results["run"], results["rows"]
    count = len({row["text"] for row in rows})
    lines = [
        f"SmolLM2-135M-Instruct (Q4_1 weights, float32 arithmetic), {count} texts of {info['length']} tokens read in "
        f"chunks of {info['chunk']}.",
        f"{info['processor']}, torch {info['torch']}, transformers {info['transformers']}, vmemory {info['vmemory']}, "
        f"commit {info['commit'][:12]}, {info['date'][:16]}.",
        "",
        "Agreement: tokens for which memory and full cache predict the same next token. Perplexity beside the full",
        "cache's on the same tokens. KL: nats a token, full cache to memory. Wins: texts on which a policy is better",
        "than `recent` (StreamingLLM: recency and 4 sinks) with the same budget.",
    ]
    for share in sorted({row["share"] for row in rows}, reverse=True):
        budget = _select(rows, share=share)[0]["budget"]
        lines += ["", f"## {budget} rows, {share:.0%}", ""]
        lines += ["| policy | texts | rows held | agreement | perplexity (full) | KL | wins: agreement | KL | loss |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        for policy in dict.fromkeys(row["policy"] for row in rows):
            mine = _select(rows, share=share, policy=policy)
            if not mine:
                continue
            pairs = [(a, _select(rows, share=share, policy="recent", text=a["text"])) for a in mine]
            beaten = [(a, b[0]) for a, b in pairs if b and policy != "recent"]
            loss, full = mean(a["loss"] for a in mine), mean(a["full_loss"] for a in mine)
            lines.append(
                f"| `{policy}` | {len(mine)} | {mean(a['rows'] for a in mine):.0f} | "
                f"{mean(a['agreement'] for a in mine):.1%} | {2.718281828**loss:.2f} ({2.718281828**full:.2f}) | "
                f"{mean(a['divergence'] for a in mine):.3f} | "
                + (
                    f"{sum(a['agreement'] > b['agreement'] for a, b in beaten)} | "
                    f"{sum(a['divergence'] < b['divergence'] for a, b in beaten)} | "
                    f"{sum(a['loss'] < b['loss'] for a, b in beaten)} |"
                    if beaten
                    else "– | – | – |"
                )
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.1], help="budgets, as a share of the text")
    parser.add_argument("--texts", type=int, help="only the first so many texts")
    parser.add_argument("--broad", type=int, default=4, help="texts on which all policies are measured")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--resume", action="store_true", help="keep the readings that `--out` holds")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kv_smollm2")
    given = parser.parse_args()

    _, tokenizer = _loaded()
    names = [t.name for t in texts() if len(tokenizer(t.text).input_ids) >= given.length + 1][: given.texts]
    # all policies on every `stride`-th text, so that both kinds of text are included
    stride = max(len(names) // max(given.broad, 1), 1)
    broad, policies = names[::stride][: given.broad], [*MAIN, *OTHERS]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    results: dict[str, Any] = {
        "run": {
            "processor": processor(), "torch": torch.__version__, "transformers": transformers.__version__,
            "vmemory": __version__, "commit": commit.strip(), "length": given.length, "chunk": given.chunk,
            "date": datetime.now(timezone.utc).isoformat(),
        },
        "rows": [],
    }  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # the main policies come first, so that an interrupted run is a smaller complete one
        order = [(name, share, MAIN) for share in sorted(given.shares) for name in names]
        order += [(name, share, OTHERS) for share in sorted(given.shares) for name in broad]
        if given.resume:
            results["rows"] = json.loads(given.out.with_suffix(".json").read_text())["rows"]
        known = {(row["text"], row["share"], row["policy"]) for row in results["rows"]}
        order = [job for job in order if (job[0], job[1], job[2][0]) not in known]
        jobs = [pool.submit(measure, name, given.length, share, which, given.chunk) for name, share, which in order]
        for done, job in enumerate(as_completed(jobs), 1):
            results["rows"] += job.result()
            results["rows"].sort(key=lambda row: (policies.index(row["policy"]), names.index(row["text"])))
            given.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(table(results))
            print(f"{done} of {len(jobs)} readings", flush=True)


if __name__ == "__main__":
    main()
