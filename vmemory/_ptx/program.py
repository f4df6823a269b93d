"""Parse PTX text to a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Address", "Instruction", "Program", "PtxError", "parse"]


class PtxError(Exception):
    """The text contains an unknown statement, or a launch made an invalid access."""


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """An instruction `@guard name.modifiers operands`; vectors are tuples of registers."""

    text: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    guard_negated: bool

    @cached_property
    def kind(self) -> str:
        """The type at the end: "f32" of `add.f32`."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Program:
    name: str
    # name to type: "u64", "f32"
    parameters: dict[str, str]
    # name to type: "pred", "b16", "b32"
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


# the beginning of a statement; an instruction never begins with a brace
_TOKEN = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+):|(?P<statement>[^;]*);)")
_INSTRUCTION = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%?\w+)\s+)?(?P<name>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s]+)\s*(?:,|$)")


class _Reader:
    """Parser of a function's body; registers of an inner scope, as in inline assembly, get unique names."""

    def __init__(self) -> None:
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = []
        self.opened = 0

    def read(self, body: str) -> None:
        at = 0
        while True:
            found = _TOKEN.match(body, at)
            if found is None:
                raise PtxError(f"body: expected an instruction, got {body[at : at + 60]!r}")
            at = found.end()
            if found["open"]:
                self.scopes.append({})
                self.opened += 1
            elif found["close"]:
                self.scopes.pop()
                if not self.scopes:
                    return
            elif found["label"]:
                self.labels[found["label"]] = len(self.instructions)
            elif statement := found["statement"].strip():
                if statement.startswith(".reg"):
                    self.declare(statement)
                elif not statement.startswith("."):
                    self.instructions.append(self.instruction(statement))

    def declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            base, _, count = name.strip().partition("<")
            for own in [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]:
                full = own if len(self.scopes) == 1 else f"{own}@{self.opened}"
                self.scopes[-1][own] = full
                self.registers[full] = kind[1:]

    def resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def instruction(self, statement: str) -> Instruction:
        found = _INSTRUCTION.fullmatch(statement)
        if found is None:
            raise PtxError(f"expected an instruction, got {statement!r}")
        # st.shared::cta is the same as st.shared
        name, *modifiers = (part.split("::")[0] for part in found["name"].split("."))
        guard = self.resolve(found["guard"]) if found["guard"] else None
        operands = tuple(self.operand(text) for text in _OPERAND.findall(found["operands"]))
        text = " ".join(statement.split())
        return Instruction(text, name, tuple(modifiers), operands, guard, found["negated"] == "!")

    def operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self.resolve(name.strip()) for name in text[1:-1].split(","))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Address(self.resolve(base.strip()), int(offset, 0) if offset else 0)
        return self.resolve(text)


def parse(text: str) -> Program:
    """Parse the only kernel of a PTX module.

    Raises:
        PtxError: The module has no kernel, or a line is not an instruction.
    """
    text = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", text, flags=re.MULTILINE)
    entry = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*", text)
    if entry is None:
        raise PtxError("text: expected a kernel (.entry)")
    parameters = {}
    for declared in filter(str.strip, entry[2].split(",")):
        _, kind, *_, name = declared.split()
        parameters[name] = kind[1:]
    reader = _Reader()
    reader.read(text[entry.end() :])
    return Program(entry[1], parameters, reader.registers, tuple(reader.instructions), reader.labels)
