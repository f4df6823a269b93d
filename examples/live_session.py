"""Push a stream frame by frame and ask questions at any time, within constant bytes and tokens.

python examples/live_session.py [--model Qwen/Qwen2.5-VL-3B-Instruct --video film.mp4]
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from shared import arguments, film, load

import vmemory

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def main(given: list[str] | None = None) -> list[tuple[int, int, int]]:
    """Return tower calls, visual tokens and bytes of the memory at each question."""
    args = arguments(__doc__.splitlines()[0], given)
    model, processor = load(args.model)
    session = vmemory.VideoSession(
        model, processor, config={"memory_policy": "merging", "memory_capacities": 6}, reuse_prefix=False
    )
    seen = []
    for i, frame in enumerate(film(args.video)):
        session.push(frame, time=i / 2)
        if i % 16 == 15:
            answer = session.ask("What happened so far?", **GREEDY)
            seen.append((session.tower.calls, session.num_tokens, session.nbytes))
            print(f"{i / 2:5.1f} s: {seen[-1][1]} visual tokens, {seen[-1][2] / 2**10:.0f} KiB; answer {answer!r}")
    print("in pieces:", list(session.stream_generate("And in the end?", **GREEDY)))
    with TemporaryDirectory() as folder:
        session.save(Path(folder) / "stream.vmem")
        again = vmemory.VideoSession.load(Path(folder) / "stream.vmem", model, processor)
        same = again.ask("And in the end?", **GREEDY) == session.ask("And in the end?", **GREEDY)
    print("a saved session answers alike:", same)
    return seen


if __name__ == "__main__":
    main()
