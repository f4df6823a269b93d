"""`vmemory localize`: measure how many moments with known times each memory finds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmemory.cli.common import check_writable, make_encoder
from vmemory.cli.report import Report, write_report
from vmemory.cli.scores import measure, print_scores
from vmemory.cli.terminal import Terminal
from vmemory.data import fetch_film, fetch_trailer
from vmemory.data.film import ATTRIBUTION
from vmemory.eval.features import video_features


def localize(
    out: Annotated[
        Path | None, typer.Option(help="Directory for report.html, localisation.png and storage.png.")
    ] = None,
) -> None:
    """Look up frames of a trailer in memories that watched the ten-minute film, and count which are found."""
    if out is not None:
        check_writable(out, folder=True)
    encoder, terminal = make_encoder(), Terminal()
    film, trailer = (video_features(path, encoder, 2.0) for path in (fetch_film(), fetch_trailer()))
    with Terminal(stderr=True).status("every memory watches the film; this takes minutes"):
        scores = measure(film, trailer, everything=True)
    print_scores(terminal, scores)
    if out is not None:
        page = write_report(out, Report(scores=scores, attribution=ATTRIBUTION))
        terminal.line(f"report: {page}")
