"""A streaming world with exact ground truth: unlimited, seeded, no downloads."""

from vmemory.data.world.blind import Guess, blind_accuracy
from vmemory.data.world.items import make_items, questions_of, tracking_item, view_of, world_item, world_of
from vmemory.data.world.make import make_worlds, write_video
from vmemory.data.world.questions import KINDS, Question, View, ask, ask_stream, chance, find
from vmemory.data.world.state import Card, Number, World
from vmemory.data.world.words import COLOURS, NUMBERS, PLACES, SHAPES, SPLITS

__all__ = [
    "COLOURS",
    "KINDS",
    "NUMBERS",
    "PLACES",
    "SHAPES",
    "SPLITS",
    "Card",
    "Guess",
    "Number",
    "Question",
    "View",
    "World",
    "ask",
    "ask_stream",
    "blind_accuracy",
    "chance",
    "find",
    "make_items",
    "make_worlds",
    "questions_of",
    "tracking_item",
    "view_of",
    "world_item",
    "world_of",
    "write_video",
]
