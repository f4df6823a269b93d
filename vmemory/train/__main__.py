"""`python -m vmemory.train recipe.yaml`, also behind `accelerate launch -m` and `torchrun -m`."""

from __future__ import annotations

import logging
import os
import sys

from vmemory.train.recipe import read_recipe, train


def main(given: list[str] | None = None) -> int:
    """Train by a recipe and return the exit code; errors of the input are one line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # one of several processes tells
    logging.getLogger("vmemory").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    words = sys.argv[1:] if given is None else given
    try:
        train(read_recipe(words))
    except KeyboardInterrupt as error:
        print(f"vmemory: {error}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"vmemory: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
