"""Evaluation of memories: what is asked, how answers are scored, what a run leaves behind and how it goes on."""

from __future__ import annotations

import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch

from tests.commands import Run, clip, colours, expect_error, run
from vmemory.banks import POLICIES, MemoryConfig, MergingBank, UniformBank
from vmemory.data.world import World, find, make_worlds, view_of
from vmemory.eval.cells import UNCOMPRESSED, Cell, cells_of, sized
from vmemory.eval.evaluate import evaluate, fingerprint
from vmemory.eval.files import file_streams
from vmemory.eval.oracle import oracle_right, seconds_shown
from vmemory.eval.records import Record, Records
from vmemory.eval.scores import score_rows
from vmemory.eval.scoring import chosen_letter, is_right, nearness
from vmemory.eval.streams import Asked, AskedStream, up_to, world_question, world_stream
from vmemory.session import VideoSession

pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
__all__ = ["clip", "colours", "run"]


@pytest.fixture(scope="module")
def worldlm():
    from vmemory.train.worldlm import world_model, world_tokenizer

    return world_model().eval(), world_tokenizer()


@pytest.fixture(scope="module")
def folder(worldlm, tmp_path_factory):
    """The untrained model as a folder."""
    path = tmp_path_factory.mktemp("model")
    for part in worldlm:
        part.save_pretrained(path)
    return path


# scores of answers


@pytest.mark.parametrize(
    ("written", "letter"),
    [
        ("B", "B"), ("(B) two", "B"), ("B.", "B"), (" B: two dogs", "B"), ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("two dogs", "B"), ("I see two dogs there", "B"), ("A cat and two dogs", None), ("D", None), ("", None),
        ("Because of nothing", None), ("two dogs and a cat", None),
    ],
)  # fmt: skip
def test_the_letter_of_an_answer(written, letter):
    assert chosen_letter(written, ("a cat", "two dogs", "no one")) == letter


def test_right_answers_are_the_same_words_or_the_right_letter():
    free = Asked(1.0, "Where?", "Red Room", "place")
    assert is_right(free, " red  room. ")
    assert not is_right(free, "red")
    choice = free._replace(options=("x", "y"), answer="B")
    assert is_right(choice, "B. y")
    assert not is_right(choice, "A")


def test_numbers_near_an_interval():
    asked = Asked(1.0, "When?", "10", "when", interval=(5.0, 15.0))
    assert [nearness(asked, text) for text in ("10", "at 5.0 s", "16", "never", "-7")] == [1, 1, 0, 0, 0]
    # spans count their intersection over their union
    assert nearness(asked, "from 5 to 15") == 1
    assert nearness(asked, "10 to 20") == pytest.approx(5 / 15)
    assert nearness(asked, "20 to 30") == 0
    assert nearness(asked, "15 to 5") == 0
    assert nearness(asked._replace(interval=(5.0, 5.0)), "5 to 5") == 1
    assert nearness(asked._replace(interval=None), "10") is None


# sizes


@pytest.mark.parametrize("policy", sorted({*POLICIES, "default"}))
@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (9, 9)])
def test_memories_stay_within_their_tokens(policy, grid):
    cell = cells_of([policy], ["50%"])[1]
    whole = 64 * math.prod(grid)
    bank = cell.memory(64, dim=16, grid=grid)
    bank.push(torch.randn(64, *grid, 16))
    held = int((bank.mass[0] > 0).sum())
    # no more than asked for, and no less than rounding to whole entries of each tier explains
    largest = max(math.prod(tier.grid) for tier in bank.tiers)
    wanted = min(whole // 2, 64 * largest) if len(bank.tiers) == 1 else whole // 2
    assert held <= whole // 2
    if policy != "hierarchical" and policy != "default":
        assert held > wanted - 2 * largest


def test_sizes_in_tokens_shares_and_bytes():
    one, two, three = (Cell("x", MemoryConfig(memory_policy="merging"), b) for b in ("24", "25%", "64KiB"))
    assert one.memory(100, dim=8, grid=(2, 2)).capacity == 6
    assert two.memory(100, dim=8, grid=(2, 2)).capacity == 25
    assert three.memory(100, dim=8, grid=(2, 2)).nbytes <= 64 * 1024
    assert Cell(UNCOMPRESSED, None).memory(100, dim=8, grid=(2, 2)).capacity == 100
    assert sized(MemoryConfig(memory_policy="hierarchical"), (2, 2), 48).memory_capacities == (6, 24)
    assert sized(MemoryConfig(memory_policy="hierarchical"), (4, 4), 64).memory_capacities == (2, 4, 16)


@pytest.mark.parametrize(
    ("policies", "budgets", "message"),
    [
        (["bogus"], ["24"], "policies: expected one of .*, default, or a .json file with settings, got 'bogus'"),
        ([], ["24"], "policies: expected at least one"),
        (["merging"], [], "budgets: expected at least one for 'merging'"),
        (["merging", "merging"], ["24"], "policies: expected each once, got 'merging@24' twice"),
        (["merging"], ["0"], "budgets: expected tokens"),
        (["merging"], ["-4"], "budgets: expected tokens"),
        (["merging"], ["a%"], "budgets: expected tokens"),
        (["merging"], ["120%"], "budgets: expected more than 0% and at most 100%"),
        (["merging"], ["0KiB"], "budget: expected a positive size"),
        (["none.json"], ["24"], "none.json: no such file"),
    ],
)
def test_bad_memories_are_named(policies, budgets, message):
    with pytest.raises(ValueError, match=message):
        cells_of(policies, budgets)


def test_settings_of_a_file(tmp_path):
    path = tmp_path / "best.json"
    for text, message in (
        ("[1]", "object of settings, got list"),
        ("{", "line 1: not JSON"),
        ('{"polcy": 1}', "polcy"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            cells_of([str(path)], [])
    path.write_text('{"memory_policy": "uniform", "memory_capacities": [5]}')
    [_, cell] = cells_of([str(path)], [])
    assert cell.name == "best"
    assert cell.memory(100, dim=8, grid=(2, 2)).capacity == 5
    with pytest.raises(ValueError, match="budgets: expected enough tokens for entries of"):
        Cell("x", MemoryConfig(memory_policy="hierarchical"), "6").memory(9, dim=8, grid=(2, 2))


# the oracle


def test_the_oracle_of_all_frames_knows_everything_and_of_none_nothing():
    stream = world_stream(3, 120)
    for moment, places in stream.moments():
        asked = [stream.questions[place] for place in places]
        assert all(oracle_right(stream.world, np.arange(int(moment) + 1), asked))
        assert not any(oracle_right(stream.world, np.zeros(0, np.int64), asked))


def test_the_oracle_sees_what_entries_hold():
    world = World(5, 90, split="test")
    features = torch.randn(90, 1, 1, 8)
    bank = UniformBank(8, (1, 1), 9)
    bank.push(features, time=torch.arange(90, dtype=torch.float64))
    held = bank.entries().frame.tolist()
    assert seconds_shown(world, bank.entries()).tolist() == held
    view = view_of(world, 89)
    [first] = find(view, "past_first_number")
    seen = [t for t in held if world.number[t] >= 0]
    right = bool(seen) and world.number[seen[0]] == world.number[next(t for t in range(90) if world.number[t] >= 0)]
    assert oracle_right(world, np.array(held), [world_question(first)]) == [right]


def test_an_entry_of_several_frames_shows_their_most_common_sight():
    world = World(5, 90, split="test")
    bank = MergingBank(8, (1, 1), 3)
    bank.push(torch.randn(90, 1, 1, 8), time=torch.arange(90, dtype=torch.float64))
    shown = seconds_shown(world, bank.entries()).tolist()
    entries = bank.entries()
    assert len(shown) == 3
    for second, first, last in zip(shown, entries.start.tolist(), entries.stop.tolist(), strict=True):
        span = np.arange(int(first), int(last) + 1)
        sight = np.stack([world.place, world.card[:, 0], world.card[:, 1], world.number], 1)
        counts = [(sight[span] == sight[t]).all(1).sum() for t in span]
        assert first <= second <= last
        assert counts[second - int(first)] == max(counts)


# watching


def test_frames_are_cut_at_the_moments_of_questions():
    pieces = [(torch.arange(4), [0.0, 1.0, 2.0, 3.0]), (torch.arange(4, 6), [4.0, 5.0])]
    got = [(m, [p.tolist() for p, _ in part]) for m, part in up_to(iter(pieces), [1.5, 1.6, 4.0, 9.0])]
    assert got == [(1.5, [[0, 1]]), (1.6, []), (4.0, [[2, 3], [4]]), (9.0, [[5]])]
    got = [(m, [p.tolist() for p, _ in part]) for m, part in up_to(iter(pieces), [2.0, math.inf])]
    assert got == [(2.0, [[0, 1, 2]]), (math.inf, [[3], [4, 5]])]


def test_answers_are_those_of_a_session_of_its_own(worldlm):
    model, tokenizer = worldlm
    stream = world_stream(7, 40, moments=2, count=5)
    cells = cells_of(["merging", "hierarchical"], ["24"])
    records = evaluate(model, tokenizer, [stream], cells, frame_tokens=4, max_new_tokens=3)
    for cell in cells[1:]:
        memory = sized(cell.config, (2, 2), 24)
        session = VideoSession(model, tokenizer, config=memory, frame_tokens=4)
        written, before = [], 0
        for moment, places in stream.moments():
            seconds = np.arange(before, int(moment) + 1)
            session.push(torch.from_numpy(stream.world.render(seconds)), seconds.astype(float))
            before = int(moment) + 1
            texts = [stream.questions[place].text for place in places]
            written += [session.ask(text, max_new_tokens=3, do_sample=False) for text in texts]
        record = records.get(stream.name, cell.name)
        assert record.written == written
        assert record.tokens <= 24


def test_the_tower_runs_once_for_all_memories(worldlm, monkeypatch):
    from vmemory.session.tower import Tower

    model, tokenizer = worldlm
    encoded = []
    counted = Tower._counted
    monkeypatch.setattr(
        Tower, "_counted", lambda self, found: (encoded.append(len(found.clips[0].frames)), counted(self, found))[1]
    )
    stream = world_stream(7, 40, moments=2, count=2)
    evaluate(
        model,
        tokenizer,
        [stream],
        cells_of(["merging", "recent", "uniform"], ["24", "50%"]),
        frame_tokens=4,
        max_new_tokens=1,
    )
    assert sum(encoded) == 40


def test_a_run_goes_on_where_it_was_interrupted(worldlm, tmp_path, monkeypatch):
    model, tokenizer = worldlm
    streams = [world_stream(seed, 30, moments=2, count=3) for seed in (1, 2)]
    cells = cells_of(["merging", "recent"], ["24"])
    how = {"frame_tokens": 4, "max_new_tokens": 2}
    path = tmp_path / "answers.jsonl"
    whole = evaluate(model, tokenizer, streams, cells, path, **how)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:40])
    told, watched = [], []
    module = import_module("vmemory.eval.evaluate")

    watch = module.watch
    monkeypatch.setattr(
        module,
        "watch",
        lambda m, p, stream, missing, *rest: (
            watched.append((stream.name, [c.name for c in missing])),
            watch(m, p, stream, missing, *rest),
        )[1],
    )
    again = evaluate(model, tokenizer, streams, cells, path, tell=told.append, **how)
    assert told == [f"{path}: its last line was not written to its end, and is left out"]
    assert watched == [(streams[1].name, ["merging@24", "recent@24"])]
    for stream in streams:
        for cell in cells:
            assert again.get(stream.name, cell.name) == whole.get(stream.name, cell.name)
    # nothing is left to do
    watched.clear()
    evaluate(model, tokenizer, streams, cells, path, **how)
    assert watched == []
    with pytest.raises(ValueError, match=r"answers.jsonl: holds results with answer 2, got 3"):
        evaluate(model, tokenizer, streams, cells, path, frame_tokens=4, max_new_tokens=3)
    other = [AskedStream(streams[0].name, streams[0].questions[:2], streams[0].frames, 30, streams[0].world)]
    with pytest.raises(ValueError, match="holds answers to other questions about"):
        evaluate(model, tokenizer, other, cells, path, **how)
    path.write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2: not a result of an evaluation"):
        evaluate(model, tokenizer, streams, cells, path, **how)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="expected results of an evaluation"):
        evaluate(model, tokenizer, streams, cells, path, **how)


def test_other_weights_have_another_fingerprint(worldlm):
    from vmemory.train.worldlm import world_model

    model, _ = worldlm
    assert fingerprint(model) == fingerprint(world_model())
    assert fingerprint(model) != fingerprint(world_model(1))
    changed = world_model()
    changed.model.projector.state_dict()[next(iter(changed.model.projector.state_dict()))].flatten()[1000] += 1
    assert fingerprint(model) != fingerprint(changed)


# rows


def stream_of(name, answers):
    questions = tuple(Asked(1.0, f"question {i}", a, "k", when="past", age=10.0 * i) for i, a in enumerate(answers))
    return AskedStream(name, questions, lambda: iter(()), 1)


def test_rows_of_known_answers():
    streams = [stream_of(f"s{i}", ["a", "a", "b", "a"]) for i in range(20)]
    records = Records(None, {})
    for i, stream in enumerate(streams):
        records.add(stream.name, UNCOMPRESSED, Record(["a", "a", "b", "x"], None, 40.0, 7))
        records.add(stream.name, "half", Record(["a", "x", "b", "x"] if i % 2 else ["x"] * 4, None, 8.0, 3))
    rows = {row.name: row for row in score_rows(records, streams, [UNCOMPRESSED, "half"])}
    assert rows["majority"].right["past"].mean == 0.75
    # the words tell which answer was right for the other streams
    assert rows["blind"].right["past"].mean == 1.0
    assert rows[UNCOMPRESSED].right["all"] == (0.75, 0.75, 0.75, 80)
    half = rows["half"].right["past"]
    assert half.mean == 0.25
    # the bootstrap draws streams: half of twenty have 0.5, so their mean has this deviation
    assert half.high - half.low == pytest.approx(2 * 1.96 * 0.25 / math.sqrt(20), rel=0.2)
    assert rows["half"].kept["past"].mean == pytest.approx(1 / 3)
    assert rows["half"].right["to 30 s"].questions == 60
    assert "now" not in rows["half"].right
    json.dumps([row.to_dict() for row in rows.values()])


def test_streams_without_all_answers_are_in_no_row():
    streams = [stream_of("a", ["x"]), stream_of("b", ["x"])]
    records = Records(None, {})
    records.add("a", UNCOMPRESSED, Record(["x"], None, 1.0, 1))
    records.add("b", UNCOMPRESSED, Record(["y"], None, 1.0, 1))
    records.add("a", "m", Record(["x"], None, 1.0, 1))
    rows = score_rows(records, streams, [UNCOMPRESSED, "m"])
    assert all(row.right["all"].questions == 1 for row in rows)
    with pytest.raises(ValueError, match="streams: expected at least one that every memory has answered"):
        score_rows(records, streams, ["none"])


# files


def test_a_world_in_files_is_asked_as_it_is_in_memory(tmp_path):
    meta = make_worlds(tmp_path, 2, seconds=30, split="test", questions=4)
    for path in (meta, tmp_path / "test.json"):
        streams, skipped = file_streams(path)
        assert len(streams) == 2
        assert all(stream.world is not None and stream.questions for stream in streams)
        assert all("tracking" in line.reason for line in skipped)
        seconds = [s for _, times in streams[0].frames() for s in times]
        assert len(seconds) <= streams[0].most_frames
        assert streams[0].questions[-1].time <= max(seconds) + 1e-3


def test_benchmark_questions_become_streams(tmp_path):
    make_worlds(tmp_path, 1, seconds=12, questions=1)
    video = next((tmp_path / "videos").iterdir())
    item = {"task": "EPM", "video": video.stem, "realtime": 7, "question": "Where?", "options": ["a", "b"], "gt": 1}
    items = [item, {**item, "task": "OCR", "realtime": 3}, {**item, "video": "none"}, {**item, "options": None}]
    path = tmp_path / "ovo.json"
    path.write_text(json.dumps(items))
    [stream], skipped = file_streams(path, tmp_path / "videos", form="ovo-bench")
    assert [(q.time, q.when, q.answer) for q in stream.questions] == [(3.0, "now", "B"), (7.0, "past", "B")]
    assert max(s for _, times in stream.frames() for s in times) == 7.0
    assert "does not exist" in skipped[1].reason
    assert "options" in skipped[0].reason
    with pytest.raises(ValueError, match="format: expected one of online, ovbench"):
        file_streams(path, form="bogus")
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected questions about videos, got none"):
        file_streams(path, form="ovo-bench")
    path.write_text('[\n{"a": }]')
    with pytest.raises(ValueError, match=r"ovo\.json: line 2: not JSON"):
        file_streams(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="expected a list of items, or sets"):
        file_streams(path)


def test_a_video_that_breaks_is_left_out_by_name(worldlm, tmp_path):
    from vmemory.sources import SourceError

    def broken():
        raise SourceError("b.mp4: no frame")
        yield

    model, tokenizer = worldlm
    good = world_stream(1, 20, moments=1, count=1)
    bad = AskedStream("bad", good.questions, broken, 20)
    told = []
    cells = cells_of(["recent"], ["8"])
    records = evaluate(model, tokenizer, [bad, good], cells, frame_tokens=4, max_new_tokens=1, tell=told.append)
    assert told == ["bad: left out: b.mp4: no frame"]
    assert score_rows(records, [bad, good], [c.name for c in cells])[0].right["all"].questions == 1


# the command


def test_the_command_writes_answers_scores_and_a_picture(run: Run, folder, tmp_path):
    from PIL import Image

    out = tmp_path / "out"
    arguments = (
        "eval",
        "world",
        "--model",
        folder,
        "--policies",
        "recent,merging",
        "--budgets",
        "24,25%",
        "--streams",
        2,
    )
    code, text, err = run(*arguments, "--seconds", 40, "--tokens", 2, "--out", out)
    assert (code, err) == (0, "")
    for name in ("majority", "blind", "uncompressed", "recent@24", "merging@25%"):
        assert name in text
    facts = json.loads((out / "scores.json").read_text())
    assert facts["streams"] == 2
    assert {"right", "oracle", "kept"} <= facts["rows"][-1].keys() | {"kept"}
    with Image.open(out / "accuracy.png") as picture:
        assert picture.width > picture.height
    before = (out / "answers.jsonl").read_bytes()
    assert run(*arguments, "--seconds", 40, "--tokens", 2, "--out", out)[0] == 0
    assert (out / "answers.jsonl").read_bytes() == before
    expect_error(run(*arguments, "--seconds", 40, "--tokens", 3, "--out", out), "holds results with answer 2, got 3")


def test_the_command_on_a_file(run: Run, folder, tmp_path):
    meta = make_worlds(tmp_path / "worlds", 2, seconds=30, questions=3)
    code, text, err = run(
        "eval", meta, "--model", folder, "--policies", "recent", "--budgets", 8, "--out", tmp_path / "o"
    )
    assert code == 0
    assert "recent@8" in text
    assert err.count("\n") == err.count("tracking")


def test_bad_input_of_the_command(run: Run, folder, tmp_path):
    expect_error(run("eval", "world", "--model", tmp_path / "none"), "none: no such folder")
    expect_error(run("eval", "world", "--model", folder, "--policies", "bogus"), "got 'bogus'")
    expect_error(run("eval", "world", "--model", folder, "--budgets", "x"), "budgets: expected tokens")
    expect_error(run("eval", tmp_path / "none.json", "--model", folder), "none.json: expected 'world' or a file")
    (tmp_path / "a.jsonl").write_text('{"video": "x.mp4"}\n{"video"\n')
    expect_error(run("eval", tmp_path / "a.jsonl", "--model", folder), "a.jsonl: line 2: not JSON")


def test_the_model_of_the_package_is_asked_by_name(run: Run, tmp_path):
    arguments = ("--policies", "default", "--budgets", "25%", "--streams", 2, "--seconds", 40, "--out", tmp_path)
    code, _, err = run("eval", "world", "--tokens", 4, *arguments)
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads((tmp_path / "scores.json").read_text())["rows"]}
    # far from what guesses reach
    assert rows["uncompressed"]["right"]["now"]["mean"] > 2 * rows["blind"]["right"]["now"]["mean"]
    assert rows["default@25%"]["right"]["now"]["mean"] > 2 * rows["blind"]["right"]["now"]["mean"]
