"""Categories of personal memories: 34 in 9 groups, as PerStream names them."""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """A kind of memory.

    Attributes:
        name: Its name in `add`, `search` and `forget`.
        group: The group that it is shown in.
        description: A sentence about what belongs there; an encoder embeds it, so that frames can be compared with it.
    """

    name: str
    group: str
    description: str

    @property
    def sentence(self) -> str:
        """Name and description as one text for an encoder."""
        return f"Category: {self.name}. Description: {self.description}"


_GROUPS: dict[str, dict[str, str]] = {
    "Personal identity": {
        "name": "the full name of a person, spoken, written on a badge or signed",
        "identification": "a passport, driving licence, identity card or any number that identifies a person",
        "vehicle": "a car, bicycle or other vehicle that somebody owns, its plate, its keys and where it stands",
        "contact": "a telephone number, e-mail address or handle under which somebody is reached",
        "education": "a school, course, degree or subject that somebody studies or has studied",
    },
    "Basic profile": {
        "nickname": "a pet name, user name or short form by which somebody is called",
        "age": "how old somebody is",
        "physical": "how somebody looks and dresses: height, hair, glasses, clothes",
        "birth": "the date and place at which somebody was born",
        "employment": "a job, employer, office, colleague or task at work",
    },
    "Health": {
        "medical": "a diagnosis, medicine, doctor, hospital or treatment",
        "health": "sleep, food, sport, weight, allergies and how somebody feels",
    },
    "Transactions": {
        "transactions": "something bought, sold, ordered, paid or returned",
        "financial": "a bank account, salary, loan, bill, tax or budget",
        "cards": "a payment, customer or member card",
    },
    "Daily behaviour": {
        "apps": "a program or device that somebody uses, and how",
        "schedule": "an appointment, habit or plan with its time",
        "browsing": "a page, video or search on a screen",
        "mentioned": "a thing, person or topic that somebody talks about",
        "phrases": "words that somebody often says",
    },
    "Location": {
        "travel": "a journey, flight, train, hotel or route",
        "location": "where somebody is at this moment",
        "places": "a shop, street, room or building that somebody knows, and where things lie in it",
    },
    "Social": {
        "relationships": "family, friends and other people, and what they are to each other",
        "birthdays": "a birthday or anniversary of somebody else",
        "interests": "what other people like and dislike",
        "addresses": "where somebody lives or works",
    },
    "Personal content": {
        "personal_interests": "books, music, games, dishes and pastimes that somebody likes",
        "notes": "a note, list or reminder",
        "media": "a photograph, film or recording",
    },
    "Communication": {
        "app_data": "what a program shows or stores about its user",
        "contacts_list": "an entry of an address book",
        "chat": "a conversation in a messenger or face to face",
        "messages": "a letter, e-mail or short message",
    },
}

CATEGORIES = tuple(Category(name, group, text) for group, named in _GROUPS.items() for name, text in named.items())
"""PerStream's 34 categories with descriptions of our own, in the order of its table."""
