"""Faults put into real logs by a seed: what they are, and in which lines."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mhesa.errors import InputError

# Lines from one fault to the next, and the lines of a drift; both with some at random.
DISTANCE, DRIFT = 10, 30
SHORT_MESSAGE = 12


@dataclass(frozen=True)
class Log:
    """How the lines of a log are read.

    Args:
        name: name of the log's file, without its ending.
        header_words: number of words before the message.
        time: pattern of the time at the beginning, which is meant to vary.
        component: pattern whose first group is the component.
        key: pattern whose first group is the entity that a line is about.
    """

    name: str
    header_words: int
    time: str
    component: str
    key: str

    def message_start(self, line: str) -> int:
        """Where the message begins."""
        found = re.match(rf"(?:\S+\s+){{{self.header_words}}}", line)
        return found.end() if found else 0


LOGS = (
    Log("HDFS", 5, r"^\d+ \d+ \d+", r"^(?:\S+ ){4}(\S+)", r"(blk_-?\d+)"),
    Log("Spark", 4, r"^\S+ \S+", r"^(?:\S+ ){3}(\S+)", r"^(?:\S+ ){3}(\S+)"),
    Log("Zookeeper", 6, r"^\S+ \S+", r"\[.*?:([^:\]]*)@", r"\[(.*):[^:]*@"),
    Log(
        "BGL",
        8,
        r"^\d+ \S+|\d{4}-\d\d-\d\d-\d\d\.\d\d\.\d\d\.\d+",
        r"^(?:\S+ ){6}(\S+)",
        r"^\S+ \S+ (\S+)",
    ),
)


def read_log(log: Log, folder: Path) -> tuple[list[str], list[bool]]:
    """The lines of a log, and whether each is labelled as an alert; only BGL has labels, its first word."""
    path = folder / f"{log.name}.log"
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if log.name != "BGL":
        return lines, [False] * len(lines)
    return [line.split(" ", 1)[1] for line in lines], [not line.startswith("- ") for line in lines]


@dataclass(frozen=True)
class Faulty:
    """A log with faults.

    Args:
        lines: lines of the log.
        faults: for each line, whether a fault made or changed it, or is to be seen at it.
    """

    lines: list[str]
    faults: list[bool]


# New lines, whether each is faulty, and the number of lines that they replace.
Change: TypeAlias = tuple[list[str], list[bool], int]
# Maps a log, its lines, a place in it and a random generator to a change; `None` where none is possible.
Fault: TypeAlias = Callable[[Log, Sequence[str], int, random.Random], "Change | None"]


def _component(log: Log, line: str) -> str:
    found = re.search(log.component, line)
    return found[1] if found else ""


def other_component(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """The message of another component under this line's header."""
    line = lines[place]
    for _ in range(100):
        other = chance.choice(lines)
        if _component(log, other) != _component(log, line):
            changed = line[: log.message_start(line)] + other[log.message_start(other) :]
            return [changed], [True], 1
    return None


def new_value(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """A value in the message is one that was never seen, and of another form."""
    values = (
        f"-{chance.randrange(10**8, 10**9)}",
        f"0x{chance.randrange(16**7, 16**8):x}",
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(6, 10))),
        "null",
    )
    return _with_word(log, lines[place], r"\S*\d\S*", lambda: chance.choice(values), chance)


def changed_word(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """A word of the message is another word of the log."""

    def word() -> str:
        other = chance.choice(lines)
        return chance.choice(re.findall(r"[A-Za-z]{3,}", other[log.message_start(other) :]) or ["none"])

    return _with_word(log, lines[place], r"[A-Za-z]{3,}", word, chance)


def _with_word(
    log: Log, line: str, pattern: str, word: Callable[[], str], chance: random.Random
) -> Change | None:
    start = log.message_start(line)
    found = list(re.finditer(pattern, line[start:]))
    if not found:
        return None
    old = chance.choice(found)
    for _ in range(100):
        new = word()
        if new != old[0]:
            return [line[: start + old.start()] + new + line[start + old.end() :]], [True], 1
    return None


def cut_short(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """The message ends after 30 to 80 % of its characters."""
    line = lines[place]
    start = log.message_start(line)
    if len(line) - start < SHORT_MESSAGE:
        return None
    end = start + int((len(line) - start) * chance.uniform(0.3, 0.8))
    return [line[:end]], [True], 1


def missing(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """A line is not there; it is to be seen at the next one."""
    return [lines[place + 1]], [True], 2


def swapped(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """Two lines in the other order."""
    if lines[place] == lines[place + 1]:
        return None
    return [lines[place + 1], lines[place]], [True, True], 2


def repeated(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """A line comes twice."""
    return [lines[place]] * 2, [False, True], 1


def drift(log: Log, lines: Sequence[str], place: int, chance: random.Random) -> Change | None:
    """The numbers of the messages grow from line to line, to a thousand times what they were."""
    stretch = list(lines[place : place + DRIFT])
    changed = []
    for index, line in enumerate(stretch):
        factor = 1000 ** ((index + 1) / len(stretch))
        start = log.message_start(line)
        numbers = re.split(r"\b(\d{1,15})\b", line[start:])
        numbers[1::2] = [str(int(int(number) * factor)) for number in numbers[1::2]]
        changed.append(line[:start] + "".join(numbers))
    return changed, [new != old for new, old in zip(changed, stretch, strict=True)], len(stretch)


FAULTS: dict[str, Fault] = {
    "another component": other_component,
    "a new value": new_value,
    "a word changed": changed_word,
    "cut short": cut_short,
    "missing": missing,
    "swapped": swapped,
    "repeated": repeated,
    "drift": drift,
}


def put_in(kind: str, log: Log, lines: Sequence[str], seed: int) -> Faulty:
    """A log with a fault of one kind about every ten lines."""
    chance = random.Random(f"{kind} {log.name} {seed}")
    faulty = Faulty([], [])
    for kept, (new, faults) in _pieces(kind, log, lines, chance):
        faulty.lines.extend([*kept, *new])
        faulty.faults.extend([False] * len(kept) + faults)
    return faulty


def _pieces(
    kind: str, log: Log, lines: Sequence[str], chance: random.Random
) -> Iterator[tuple[Sequence[str], tuple[list[str], list[bool]]]]:
    """Lines as they are, and after them a fault; again and again."""
    start = 0
    while (place := start + chance.randint(DISTANCE // 2, 3 * DISTANCE // 2)) + 1 < len(lines):
        made = FAULTS[kind](log, lines, place, chance)
        if made is None:
            yield lines[start : place + 1], ([], [])
            start = place + 1
        else:
            new, faults, replaced = made
            yield lines[start:place], (new, faults)
            start = place + replaced
    yield lines[start:], ([], [])
