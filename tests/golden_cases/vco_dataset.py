"""VideoChat-Online's own expansion of annotated items: frames, turns and texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.recordings import Case
from vmemory.data.online.conversation import parts_of, tagged_text, tracking_turns
from vmemory.data.online.item import Box, Turn
from vmemory.data.online.sampling import frame_indices

# the recorded videos have 30 frames a second, the long one 25
RATES = {"a.mp4": 30.0, "a": 25.0}


def check(case: Case) -> None:
    for name, recorded in case.facts["get_frame_indices"].items():
        count, rate, method, most = re.fullmatch(r"vlen=(\d+),fps=([\d.]+),(\w+),max=(\d+)", name).groups()
        ours = frame_indices(int(count), float(rate), method, int(most))
        # the original has no frame of a clip that is shorter than half a period
        assert ours == (recorded or [int(count) // 2])
    for name, recorded in case.facts["cases"].items():
        if "reset" not in name:
            _expanded(name, recorded["item"], recorded["result"])


def _expanded(name: str, item: dict[str, Any], result: dict[str, Any]) -> None:
    texts = [turn["value"] for turn in result["conversations"][::2]]
    answers = [turn["value"] for turn in result["conversations"][1::2]]
    asked = [turn["timestamps"] for turn in result["conversations"][::2]]
    if "query_template" in item:
        files = [Path(path).name for path in result["paths"]]
        boxes = [Box(box["timestamp"], box["bbox"]) for box in item["image_bboxes"]]
        boxes = [box for box, file in zip(boxes, item["all_image_files"], strict=True) if file in files]
        times = [round(box.time, 1) for box in boxes]
        turns = tracking_turns(boxes, item["query_template"]["value"], times.index(asked[0]))
    else:
        times = [round(i / RATES[item["video"]], 1) for i in result["frame_indices"]]
        written = item["conversations"]
        # beyond the end the original moves a question to a tenth of a second behind the last frame
        turns = [
            Turn(time, q["value"], a["value"]) for time, q, a in zip(asked, written[::2], written[1::2], strict=True)
        ]
    parts = parts_of(turns, times)
    ours = [tagged_text(part, times) for part in parts]
    last = f"Frame{len(times)} at {times[-1]:.1f}s: <image>"
    # the original leaves out the last frame of the video
    assert not any(last in text for text in texts), name
    assert [re.sub(rf"\n?{re.escape(last)}", "", text) for text in ours] == texts, name
    assert (last in ours[-1]) == (asked[-1] >= times[-1])
    assert [part.answer for part in parts] == answers, name
    assert [part.time for part in parts] == asked, name
