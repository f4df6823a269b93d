"""`vmemory localize`: how well each memory finds moments of a film again, with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vmemory.cli.common import check_writable, make_encoder
from vmemory.cli.report import Report, write_report
from vmemory.cli.scores import measure, print_scores
from vmemory.data import fetch_film, fetch_trailer
from vmemory.data.film import ATTRIBUTION
from vmemory.eval.features import video_features


def localize(
    out: Annotated[
        Path | None, typer.Option(help="Directory for report.html, localisation.png and storage.png.")
    ] = None,
) -> None:
    """Look frames of a trailer up in memories that watched the film, and count who finds them."""
    if out is not None:
        check_writable(out, folder=True)
    encoder = make_encoder()
    film, trailer = (video_features(path, encoder, 2.0) for path in (fetch_film(), fetch_trailer()))
    scores = measure(film, trailer, few_bits=True)
    console = Console()
    print_scores(console, scores)
    if out is not None:
        page = write_report(out, Report(scores=scores, attribution=ATTRIBUTION))
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
