"""Attach a memory to a video model: `generate` works as before, and the prompt does not grow with the video.

python examples/attach_and_generate.py [--model Qwen/Qwen2.5-VL-3B-Instruct --video film.mp4]
"""

from __future__ import annotations

from shared import arguments, film, load, prompt

import vmemory


def main(given: list[str] | None = None) -> dict[int, int]:
    """Return the visual tokens of the prompt for each number of frames."""
    args = arguments(__doc__.splitlines()[0], given)
    model, processor = load(args.model)
    whole = film(args.video)
    held = {}
    # 2 entries at full size, 4 at half the side, 8 at a quarter
    with vmemory.attach(model, config={"memory_capacities": [2, 4, 8]}) as handle:
        for frames in (len(whole) // 2, len(whole)):
            inputs = prompt(processor, whole[:frames], "What happened?").copy()
            out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            # the output begins with the caller's prompt, so this line is the same as without a memory
            answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            (kept,) = handle.last_prompt
            held[frames] = kept.tokens_after
            print(f"{frames} frames: {kept.tokens_before} visual tokens became {kept.tokens_after}; answer {answer!r}")
        with handle.disabled():
            model.generate(**prompt(processor, whole[:8], "What happened?"), max_new_tokens=1)
    print("attached:", vmemory.attached(model))
    return held


if __name__ == "__main__":
    main()
