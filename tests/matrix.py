"""`--matrix-table PATH`: what the contract of attach found for each family and policy, as a page for the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# name of a test -> letter in the table, what has passed where the letter stands
PAIRED = {
    "test_a_memory_that_holds_everything_changes_nothing_to_the_bit": (
        "B",
        "**bits**: a memory that holds everything changes no bit of the logits, of `forward` and of `generate`; one "
        "video, and two in prompts of uneven length, padded on either side.",
    ),
    "test_a_memory_that_selects_equals_masking_the_rest": (
        "M",
        "**masking**: where a memory keeps some tokens and drops the rest, the logits are those of the unpatched model "
        "with the dropped tokens masked out and the kept ones at their true positions.",
    ),
    "test_generate_gives_the_prompt_back": (
        "G",
        "**generate**: greedy decoding, beams and sampling run on pooled or merged memories and hand the caller's own "
        "prompt back.",
    ),
    "test_gradients_reach_tower_and_memory": (
        "L",
        "**learning**: a loss on the answer sends gradients through the memory into projector and vision tower, and "
        "into the memory where it has weights.",
    ),
    "test_detach_leaves_no_trace": (
        "D",
        "**detach**: switched off, detached, or detached from a deep copy, the model is what it was: attributes, "
        "modules, hooks, config, logits.",
    ),
}
PER_FAMILY = {
    "test_the_tower_in_pieces_is_the_tower": "tower in pieces",
    "test_short_videos_pass_untouched": "short videos untouched",
    "test_a_session_equals_the_whole_video_at_once": "session equals offline",
    "test_a_question_in_words": "questions in words",
}
PARAMETERS = re.compile(r"::(?P<name>\w+)\[(?P<family>\w+)(?:-(?P<policy>\w+))?\]$")
MIXED, UNMASKABLE, OTHER = "¹", "²", "not run"

Outcomes = dict[tuple[str, str, str | None], str]


class MatrixTable:
    """Notes how each test of the contract ended and writes the page when the run is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = PARAMETERS.search(report.nodeid)
        if found is None or found["name"] not in PAIRED.keys() | PER_FAMILY.keys():
            return
        key = (found["name"], found["family"], found["policy"])
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[key] = "failed" if "failed" in (report.outcome, self.outcomes.get(key)) else report.outcome

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(page(self.outcomes))


def page(outcomes: Outcomes) -> str:
    """The page, from how each (test, family, policy) ended; what is not there was not run."""
    import torch
    import transformers

    from tests.tiny_vlms import FAMILIES
    from vmemory.banks import POLICIES

    lines = [
        "# Families and policies",
        "",
        "What the contract tests of `vmemory.attach` and `vmemory.VideoSession` found. This page is written by them, "
        "not by hand:",
        "",
        "```sh",
        "python -m pytest tests/test_attach.py tests/test_session.py tests/test_session_words.py \\",
        "    --matrix --matrix-table docs/families.md",
        "```",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, on the CPU. The models are "
        "tiny and random, of each family's own classes: the tests show that prompts, positions and features fit, not "
        "how well a checkpoint answers. CLIP, the remote code of VideoLLaMA3 and LLaVA-Qwen, CLIP4Clip and STOP have "
        "tests of their own.",
        "",
    ]
    # policies with the same outcomes share a column
    columns: dict[tuple[str, ...], list[str]] = {}
    for policy in POLICIES:
        marks = (" ".join(_mark(outcomes, test, family, policy) for test in PAIRED) for family in FAMILIES)
        columns.setdefault(tuple(marks), []).append(f"`{policy}`")
    lines += [f"| family | {' | '.join(map(', '.join, columns.values()))} |", "|---|" + "---|" * len(columns)]
    rows = zip(FAMILIES, zip(*columns, strict=True), strict=True)
    lines += [f"| `{family}` | {' | '.join(cells)} |" for family, cells in rows]
    lines += ["", *(f"- {letter}: {words}" for letter, words in PAIRED.values()), ""]
    lines += [
        f"–{MIXED} not comparable: a merged or fused token is none of the model's own, so there is no masked model to "
        "compare with. "
        f"–{UNMASKABLE} not comparable: layers with linear attention take every token in, a mask does not take it out "
        "again. The other checks stand.",
        "",
        "Checks that do not depend on the policy, with the hierarchical memory:",
        "",
        f"| family | {' | '.join(PER_FAMILY.values())} |",
        "|---|" + "---|" * len(PER_FAMILY),
    ]
    for family in FAMILIES:
        ended = (outcomes.get((test, family, None), OTHER) for test in PER_FAMILY)
        lines.append(f"| `{family}` | {' | '.join(ended)} |")
    return "\n".join(lines) + "\n"


def _mark(outcomes: Outcomes, test: str, family: str, policy: str) -> str:
    from tests.attach_oracle import MIXES, RECURRENT

    letter = PAIRED[test][0]
    ended = outcomes.get((test, family, policy))
    if ended == "passed":
        return letter
    if ended is None and letter == "M" and policy in MIXES:
        return "–" + MIXED
    if ended is None and letter == "M" and family in RECURRENT:
        return "–" + UNMASKABLE
    return f"**{letter} {ended or OTHER}**"
