"""The bundled models' task: word problems whose answer is worked out step by step.

A problem is a chain of three to six operations on a small number. Doubling, tripling, halving and
taking a third stand between sums on purpose: a chain of sums alone can be computed in one forward
of a small network, a chain with products cannot, so the number of denoising steps matters.

The worked-out solution has free choices of wording (``+`` or ``plus``, ``then`` or ``next``), as
real text has. No forward can be sure of them, which is what makes parallel decoding hard on real
models and would be missing from a toy with one right answer.

Training and held-out problems are disjoint by construction: the abstract chain (start, operations,
operands) is hashed, and every sixteenth hash value belongs to the held-out side.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SPECIAL = ("<mask>", "<eos>", "<pad>")
NAMES = ("tom", "ann", "eva", "max", "lea", "sam")
THINGS = ("apples", "coins", "books", "stamps", "shells", "cards")
CONNECTIVES = ("first", "then", "next", "now")
SIGNS = {"add": ("+", "plus"), "sub": ("-", "minus"), "mul": ("x", "times"), "div": ("/", "over")}
EQUALS = ("=", "is", "makes")
LIMIT = 40
ANSWER_LENGTH = 48
HELD_OUT_EVERY = 16

_PHRASES = {
    ("add", None): (("finds", "#"), ("gets", "#", "more")),
    ("sub", None): (("loses", "#"), ("gives", "#", "away")),
    ("mul", 2): (("they", "double"),),
    ("mul", 3): (("they", "triple"),),
    ("div", 2): (("keeps", "half"), ("half", "are", "lost")),
    ("div", 3): (("keeps", "a", "third"),),
}
_ANSWER = "answer"


@dataclass(frozen=True)
class Problem:
    """One problem: the prompt, one of its correct solutions, and the number that is asked for."""

    prompt: str
    solution: str
    answer: int


def vocabulary() -> list[str]:
    """Every token, in id order; the first three are mask, end of sequence and padding."""
    words: dict[str, None] = dict.fromkeys(SPECIAL)
    groups = [NAMES, THINGS, ("has", "he", "how", "many", ".", "?"), CONNECTIVES]
    groups += [*SIGNS.values(), EQUALS, (_ANSWER,)]
    groups += [phrase for options in _PHRASES.values() for phrase in options]
    for group in groups:
        words.update(dict.fromkeys(w for w in group if w != "#"))
    words.update(dict.fromkeys(str(n) for n in range(LIMIT)))
    return list(words)


def _operations(value: int) -> list[tuple[str, int, int]]:
    """The operations that keep ``value`` in ``[1, LIMIT)``, as (kind, operand, result)."""
    found = [("add", n, value + n) for n in range(1, 13) if value + n < LIMIT]
    found += [("sub", n, value - n) for n in range(1, 13) if value - n >= 1]
    found += [("mul", n, value * n) for n in (2, 3) if value * n < LIMIT]
    found += [("div", n, value // n) for n in (2, 3) if value % n == 0]
    return found


def _draw_chain(rng: random.Random) -> list[tuple[int, str, int, int]]:
    """A chain of (value, kind, operand, result) whose last result is the answer."""
    value = rng.randint(2, LIMIT - 1)
    chain = []
    for _ in range(rng.choice((3, 4, 5, 6))):
        options = _operations(value)
        serial = [o for o in options if o[0] in ("mul", "div")]
        kind, operand, result = rng.choice(serial if serial and rng.random() < 0.6 else options)
        chain.append((value, kind, operand, result))
        value = result
    return chain


def _is_held_out(chain: list[tuple[int, str, int, int]]) -> bool:
    key = ";".join(f"{value} {kind} {operand}" for value, kind, operand, _ in chain)
    return zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0


def draw_problem(rng: random.Random, *, held_out: bool) -> Problem:
    """Draw one problem from the training side or from the held-out side."""
    chain = _draw_chain(rng)
    while _is_held_out(chain) is not held_out:
        chain = _draw_chain(rng)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    prompt = [name, "has", str(chain[0][0]), thing, "."]
    solution = []
    for value, kind, operand, result in chain:
        phrase = rng.choice(_PHRASES.get((kind, operand)) or _PHRASES[kind, None])
        subject = () if phrase[0] in ("they", "half") else ("he",)
        prompt += [*subject, *(str(operand) if w == "#" else w for w in phrase), "."]
        solution += [rng.choice(CONNECTIVES), str(value), rng.choice(SIGNS[kind])]
        solution += [str(operand), rng.choice(EQUALS), str(result)]
    prompt += ["how", "many", thing, "?"]
    solution += [_ANSWER, str(chain[-1][3])]
    return Problem(" ".join(prompt), " ".join(solution), chain[-1][3])


def held_out_problems(count: int, seed: int = 0) -> list[Problem]:
    """``count`` held-out problems, the same ones for the same seed."""
    rng = random.Random(f"held-out {seed}")
    return [draw_problem(rng, held_out=True) for _ in range(count)]


def read_answer(text: str) -> int | None:
    """The number after the last ``answer`` of a decoded solution, or None."""
    words = text.split()
    if _ANSWER not in words:
        return None
    tail = words[len(words) - 1 - words[::-1].index(_ANSWER) + 1 :]
    return int(tail[0]) if len(tail) == 1 and tail[0].isdigit() else None
