"""Models that commands load by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmemory.cli.errors import UserError

# the small model of the world that comes with the package
WORLDLM = "worldlm"


def video_model(name: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model in evaluation mode and its processor.

    Args:
        name: `"worldlm"`, which comes with the package; a folder; or an id on a hub.
        device: `"cpu"`, `"cuda"`, …; None = a GPU if there is one.
        dtype: As in `vmemory.models.loading.load_model`.

    Raises:
        UserError: There is no such model.
    """
    from transformers.utils import logging

    from vmemory.models.loading import device_for, load_model

    logging.disable_progress_bar()
    place = device_for(device)
    if name == WORLDLM:
        from vmemory.train.worldlm import load_worldlm

        loaded, tokenizer = load_worldlm()
        return loaded.to(place), tokenizer
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"{name}: no such folder")
    try:
        return load_model(str(Path(name).expanduser()), place, dtype)
    except OSError as error:
        raise UserError(f"{name}: expected worldlm, a folder with a model or an id on a hub ({error})") from error
