"""The file of an evaluation: a line for each stream and cell, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from vmemory.eval.streams import Asked, AskedStream


class Record(NamedTuple):
    """The answers of one cell about one stream.

    Attributes:
        written: What the model wrote for each question.
        oracle: Whether the entries held give the right answer to each question; None where that is not known.
        tokens: Visual tokens in the prompt, mean over the moments.
        nbytes: Bytes of the memory.
    """

    written: list[str]
    oracle: list[bool] | None
    tokens: float
    nbytes: int


class Records:
    """The results of an evaluation, in memory and in a JSON-lines file.

    Args:
        path: The file; made where it is missing. None = in memory only.
        header: What the results belong to: model and settings.

    Attributes:
        cut: A line about a last line that was not written to its end, or None.

    Raises:
        ValueError: The file holds other things, or results of another header.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.cut: str | None = None
        self._held: dict[tuple[str, str], Record] = {}
        self._questions: dict[str, list[Any]] = {}
        if path is not None and path.exists() and path.stat().st_size:
            self._read(path, header)
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"evaluation": 1, **header})

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            self.cut = f"{path}: its last line was not written to its end, and is left out"
            with path.open("r+b") as file:
                file.truncate(end)
        for number, line in enumerate(whole[:end].decode().splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(path, entry, {"evaluation": 1, **header})
                elif "questions" in entry:
                    self._questions[entry["stream"]] = entry["questions"]
                else:
                    held = {name: entry[name] for name in Record._fields}
                    self._held[entry["stream"], entry["cell"]] = Record(**held)
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number}: not a result of an evaluation") from None
        if end == 0:
            self._append({"evaluation": 1, **header})

    def _check(self, path: Path, found: Any, wanted: dict[str, Any]) -> None:
        if not isinstance(found, dict) or "evaluation" not in found:
            raise ValueError(f"{path}: expected results of an evaluation, got another file")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{path}: holds results with {name} {found.get(name)!r}, got {value!r}; write to another folder"
                )

    def _append(self, entry: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def ask(self, stream: AskedStream) -> None:
        """Write the questions about a stream.

        Raises:
            ValueError: The file holds answers to others.
        """
        asked = json.loads(json.dumps([written(question) for question in stream.questions]))
        known = self._questions.get(stream.name)
        if known is None:
            self._questions[stream.name] = asked
            self._append({"stream": stream.name, "questions": asked})
        elif known != asked:
            raise ValueError(f"{self.path}: holds answers to other questions about {stream.name}")

    def add(self, stream: str, cell: str, record: Record) -> None:
        """Add the answers of a cell about a stream."""
        self._held[stream, cell] = record
        self._append({"stream": stream, "cell": cell, **record._asdict()})

    def get(self, stream: str, cell: str) -> Record | None:
        """Return the answers of a cell about a stream, or None."""
        return self._held.get((stream, cell))


def written(asked: Asked) -> dict[str, Any]:
    """Return a question as a JSON object."""
    facts = asked._asdict()
    # JSON has no infinity
    return {**facts, "time": None if asked.time == float("inf") else asked.time}
