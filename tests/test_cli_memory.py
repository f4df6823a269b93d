"""`vmemory memory`: what is listed, found, forgotten and exported."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import Links, expect_error
from tests.test_graph import Words
from tests.test_graph_file import other_version
from vmemory.cli import app, memory, memory_page
from vmemory.graph import MemoryGraph


def png() -> bytes:
    """A small green picture."""
    from PIL import Image

    made = io.BytesIO()
    Image.new("RGB", (32, 18), (20, 160, 60)).save(made, "PNG")
    return made.getvalue()


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(memory, "SentenceEncoder", Words)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        code = app.run(["memory", *map(str, arguments)])
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return run_command


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "me.graph"
    with MemoryGraph(path, encoder=Words()) as graph:
        for time, (subject, predicate, object, category) in enumerate(
            (
                ("I", "keep snacks in", "the car", "vehicle"),
                ("the car", "stands at", "the garage", "places"),
                ("I", "drink", "<b>tea</b>", "interests"),
                ("Anna", "reads", "a book", "media"),
            )
        ):
            caption = f"{subject} {predicate} {object}"
            tokens = torch.ones(4, 4)
            graph.add(
                subject, predicate, object, category, caption, time=60.0 * time, mean=tokens, nearest=tokens,
                picture=png() if time == 1 else None, video="walk.mp4", seconds=5.0 * time, frame=time,
                valid_to=500.0 if time == 2 else float("inf"), user="anna" if subject == "Anna" else None,
            )  # fmt: skip
    return path


def test_lists_oldest_first(run, path):
    code, out, err = run(path, "list")
    assert (code, err) == (0, "")
    assert out.index("snacks") < out.index("garage") < out.index("tea")
    assert "book" not in out
    assert "1:00" in out
    assert "book" in run(path, "list", "--user", "anna")[1]
    assert "snacks" not in run(path, "list", "--category", "places")[1]
    assert "2 older ones" in run(path, "list", "--last", 1)[1]


def test_searches_and_walks(run, path):
    code, out, err = run(path, "search", "snacks in the car", "-k", 1, "--delta", 0.2)
    assert (code, err) == (0, "")
    assert "snacks" in out
    assert "garage" in out


def test_forgets_for_ever(run, path):
    code, out, _ = run(path, "forget", "--node", "the car", "--yes")
    assert code == 0
    assert "forgot 2 memories" in out
    assert b"snacks" not in path.read_bytes()
    code, out, _ = run(path, "forget", "--everything", "--yes")
    assert "forgot 1 memory\n" in out
    expect_error(run(path, "list"), "nothing is remembered of user 'me'; others are remembered: anna")


@pytest.mark.parametrize(
    ("answer", "message"), [("n\n", "nothing was forgotten"), ("", "expected an answer, or --yes")]
)
def test_does_not_forget_without_a_yes(run, path, monkeypatch, answer, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    code, out, err = run(path, "forget", "--everything")
    # the prompt leaves a space
    assert (code, out.strip()) == (1, "")
    assert message in err
    assert "snacks" in run(path, "list")[1]


def test_counts(run, path):
    code, out, _ = run(path, "stats")
    assert code == 0
    assert "me 3, anna 1" in out.replace("\n", " ")


def test_exports_everything_as_json(run, path, tmp_path):
    assert run(path, "export", tmp_path / "out.json")[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [entry["id"] for entry in found] == [1, 2, 3]
    assert found[0]["valid_to"] is None
    assert found[2]["valid_to"] == 500.0
    assert found[1]["picture"].startswith("iVBOR")
    assert "picture" not in found[0]


def test_the_page_stands_alone_and_shows_text_as_text(run, path, tmp_path):
    with MemoryGraph(path) as graph:
        graph.reduce(60, rule="gsbn")
    page = tmp_path / "page.html"
    assert run(path, "export", page)[0] == 0
    text = page.read_text()
    parser = Links()
    parser.feed(text)
    assert parser.links
    assert all(link.startswith("data:image/jpeg") for link in parser.links)
    assert "<script" not in text
    assert "<b>tea</b>" not in text
    assert "&lt;b&gt;tea&lt;/b&gt;" in text
    assert text.count('class="hollow') == 1
    for word in ("My memories", "Location", "the garage", "removed"):
        assert word in text


def test_a_picture_that_cannot_be_decoded_is_left_out(run, path, tmp_path):
    with MemoryGraph(path, encoder=Words()) as graph:
        graph.add("I", "see", "a cup", "places", "I see a cup", time=999.0, picture=b"\xff\xd8\xff" + bytes(99))
    assert run(path, "export", tmp_path / "page.html")[0] == 0
    assert "I see a cup" in (tmp_path / "page.html").read_text()


def test_nodes_lie_apart_and_in_the_picture():
    at = memory_page.layout(30, [(0, i) for i in range(1, 15)] + [(20, 21)])
    assert at.shape == (30, 2)
    assert (at >= 0).all()
    assert (at <= 1).all()
    apart = np.linalg.norm(at[:, None] - at[None], axis=-1) + np.eye(30)
    assert apart.min() > 0.02
    assert np.array_equal(at, memory_page.layout(30, [(0, i) for i in range(1, 15)] + [(20, 21)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--category", "pets"), "category: expected one of name, "),
        (("list", "--since", 1000), "no memory passes"),
        (("search", " "), "question: expected words"),
        (("search", "office"), "no memory is as similar to the question as 0.3"),
        (("forget",), "expected --everything, or one of --node"),
        (("forget", "--everything", "--node", "x"), "expected --everything, or one of"),
        (("forget", "--node", "nobody", "--yes"), "no memory passes"),
        (("export", "page.txt"), "expected a name that ends with .html or .json"),
    ],
)
def test_bad_input_is_told_in_one_line(run, path, arguments, message):
    expect_error(run(path, *arguments), message)


def test_files_that_are_no_graph(run, path, tmp_path):
    expect_error(run(tmp_path / "none.graph", "list"), "no such file")
    assert not (tmp_path / "none.graph").exists()
    (tmp_path / "a.txt").write_text("hello")
    expect_error(run(tmp_path / "a.txt", "list"), "a.txt: not a memory graph")
    MemoryGraph(tmp_path / "empty.graph").close()
    expect_error(run(tmp_path / "empty.graph", "list"), "nothing is remembered of user 'me'$")
    expect_error(run(tmp_path / "empty.graph", "search", "tea"), "nothing is remembered of user 'me'$")
    expect_error(run(tmp_path / "empty.graph", "stats"), "nothing is remembered yet")
    with MemoryGraph(path):
        expect_error(run(path, "list"), "in use by another process")
    other_version(path)
    expect_error(run(path, "list"), "version 2, this vmemory reads version 1")
