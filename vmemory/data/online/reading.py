"""Items out of files: JSON, a JSON object a line, and lists of several sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from vmemory.data.online.item import Item, ItemError, read_item

DataLike: TypeAlias = "str | Path | Sequence[Mapping[str, Any]]"


class Skipped(NamedTuple):
    """An item that was left out, and why."""

    name: str
    reason: str


class Annotations(NamedTuple):
    """Items as they are repeated, those left out, and what the format statistics need of the raw ones."""

    items: list[Item]
    skipped: list[Skipped]


def read_annotations(data: DataLike, root: str | Path = "") -> Annotations:
    """Read items of one set or of several.

    Args:
        data: Path of a `.json` or `.jsonl` file, or a sequence of mappings such as a 🤗 `datasets.Dataset`. A JSON
            object of objects with `annotation`, `data_root` and `repeat_time` names several sets; its paths are
            relative to its folder.
        root: Folder that the videos of a single set are relative to.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not JSON, where the line is named; or JSON of another form.
    """
    if not isinstance(data, str | Path):
        return _checked(data, Path(root), "item", 1.0)
    path = Path(data)
    if path.suffix == ".jsonl":
        return _lines(path, Path(root), 1.0)
    loaded = read_json(path)
    if isinstance(loaded, list):
        return _checked(loaded, Path(root), path.name, 1.0)
    if not isinstance(loaded, dict) or not all(
        isinstance(entry, dict) and "annotation" in entry for entry in loaded.values()
    ):
        raise ValueError(f"{path}: expected a list of items, or sets with an annotation each, got {_form(loaded)}")
    items, skipped = [], []
    for name, entry in loaded.items():
        repeat = entry.get("repeat_time", 1)
        if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 < repeat < 1e6:
            raise ValueError(f"{path}: {name}: expected a repeat_time above 0, got {repeat!r}")
        file, folder = path.parent / entry["annotation"], path.parent / entry.get("data_root", "")
        if file.suffix == ".jsonl":
            part = _lines(file, folder, repeat)
        else:
            listed = read_json(file)
            if not isinstance(listed, list):
                raise ValueError(f"{file}: expected a list of items, got {_form(listed)}")
            part = _checked(listed, folder, name, repeat)
        items += part.items
        skipped += part.skipped
    return Annotations(items, skipped)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: Not JSON, where the line is named, or not UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None


def _lines(path: Path, root: Path, repeat: float) -> Annotations:
    loaded: list[Any] = []
    broken: list[Skipped] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            loaded.append((f"{path.name}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            broken.append(Skipped(f"{path.name}, line {number}", f"not JSON ({error.msg})"))
    read = _named(loaded, root, repeat)
    return Annotations(read.items, [*broken, *read.skipped])


def _checked(raw: Sequence[Any], root: Path, where: str, repeat: float) -> Annotations:
    return _named([(f"{where}, item {i}", raw[i]) for i in range(len(raw))], root, repeat)


def _named(raw: Sequence[tuple[str, Any]], root: Path, repeat: float) -> Annotations:
    items: list[Item] = []
    skipped: list[Skipped] = []
    for where, entry in raw:
        try:
            items.append(read_item(entry, root, where))
        except ItemError as error:
            name, reason = str(error).split(": ", 1)
            skipped.append(Skipped(name, reason))
    whole, rest = divmod(repeat, 1)
    return Annotations(items * int(whole) + items[: round(rest * len(items))], skipped)


def _form(loaded: Any) -> str:
    return (
        f"an object with {', '.join(map(repr, list(loaded)[:3]))}"
        if isinstance(loaded, dict)
        else type(loaded).__name__
    )
