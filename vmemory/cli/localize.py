"""`vmemory localize`: how well each memory finds moments again, with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmemory.cli.common import check_writable, make_encoder
from vmemory.cli.errors import UserError
from vmemory.cli.report import Report, write_report
from vmemory.cli.scores import measure, print_scores
from vmemory.cli.small_sets import print_bikes, print_walk
from vmemory.cli.terminal import Terminal
from vmemory.data import fetch_film, fetch_trailer
from vmemory.data.film import ATTRIBUTION
from vmemory.eval.features import video_features

SETS = ("film", "walk", "bikes")


def localize(
    out: Annotated[
        Path | None, typer.Option(help="Directory for report.html, localisation.png and storage.png, of the film.")
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            "--set",
            help="film: frames of a trailer looked up in ten minutes; walk: photos in a walk of 20; "
            "bikes: pictures and sentences in six shots.",
        ),
    ] = "film",
) -> None:
    """Look things up in memories that watched a video, where the answers are known, and count who finds them."""
    if name not in SETS:
        raise UserError(f"set: expected one of {', '.join(SETS)}, got {name!r}")
    if out is not None and name != "film":
        raise UserError(f"out: only the film has a report, not the set {name!r}")
    if out is not None:
        check_writable(out, folder=True)
    encoder, terminal = make_encoder(), Terminal()
    if name != "film":
        (print_walk if name == "walk" else print_bikes)(terminal, encoder)
        return
    film, trailer = (video_features(path, encoder, 2.0) for path in (fetch_film(), fetch_trailer()))
    with Terminal(stderr=True).status("every memory watches the film; this takes minutes"):
        scores = measure(film, trailer, everything=True)
    print_scores(terminal, scores)
    if out is not None:
        page = write_report(out, Report(scores=scores, attribution=ATTRIBUTION))
        terminal.line(f"report: {page}")
