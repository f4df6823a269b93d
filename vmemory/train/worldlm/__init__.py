"""A small video language model, trained from nothing on the world."""

from vmemory.train.worldlm.model import world_model
from vmemory.train.worldlm.recipe import load_worldlm, train_worldlm
from vmemory.train.worldlm.words import world_tokenizer

__all__ = ["load_worldlm", "train_worldlm", "world_model", "world_tokenizer"]
