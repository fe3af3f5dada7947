"""The bundled models' task: five friends work a problem out together.

A problem is a chain of three to five operations on a small number. Doubling, tripling, halving and
taking a third stand between sums on purpose: a chain of sums alone can be computed in one forward
of a small network, a chain with products cannot, so the number of denoising steps matters.

The solution has one sentence for each operation, and each sentence begins with the friend who works
it out. The prompt says who that is: the friends take turns in their fixed order (``in order``), or
nobody takes a second turn (``each once``). In the second case every name is open, but not
independent of the others: a decoder that fills in several names at once, each by its own most
probable value, gives somebody two turns. One at a time is safe, because a name that stands rules
itself out elsewhere. Everything else in a solution is certain: fixed words, copies from the prompt,
and sums. Parallel decoding of real text meets the same mixture: a few tokens that are uncertain and
depend on each other among many that are certain.

Training and held-out problems are disjoint by construction: the abstract chain (start, operations,
operands) is hashed, and every sixteenth hash value belongs to the held-out side.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SPECIAL = ("<mask>", "<eos>", "<pad>")
FRIENDS = ("tom", "ann", "eva", "max", "lea")
THINGS = ("apples", "coins", "books", "stamps", "shells", "cards")
RULES = ("each once", "in order")
SIGNS = {"add": "+", "sub": "-", "mul": "x", "div": "/"}
LIMIT = 40
LARGEST = 6  # of what is added or taken away
OPERATIONS = (3, 4, 5)
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
_SENTENCE = 6  # name, value, sign, operand, =, result


@dataclass(frozen=True)
class Problem:
    """One problem: the prompt, one of its correct solutions, and the number that is asked for.

    Attributes:
        prompt: the question, words with spaces between.
        solution: one of the correct solutions.
        answer: the number that the solution ends in.
        in_order: whether the friends take turns in the order of ``FRIENDS``; if not, nobody takes a
            second turn.
    """

    prompt: str
    solution: str
    answer: int
    in_order: bool


def vocabulary() -> list[str]:
    """Every token, in id order; the first three are mask, end of sequence and padding."""
    words: dict[str, None] = dict.fromkeys(SPECIAL)
    groups: list[tuple[str, ...]] = [
        (*FRIENDS, "sam"),
        THINGS,
        ("has", "he", "how", "many", ".", "?"),
    ]
    groups += [tuple(rule.split()) for rule in RULES]
    groups += [tuple(SIGNS.values()), ("=", _ANSWER)]
    groups += [phrase for options in _PHRASES.values() for phrase in options]
    for group in groups:
        words.update(dict.fromkeys(w for w in group if w != "#"))
    words.update(dict.fromkeys(str(n) for n in range(LIMIT)))
    return list(words)


def _operations(value: int) -> list[tuple[str, int, int]]:
    """The operations that keep ``value`` in ``[1, LIMIT)``, as (kind, operand, result)."""
    found = [("add", n, value + n) for n in range(1, LARGEST + 1) if value + n < LIMIT]
    found += [("sub", n, value - n) for n in range(1, LARGEST + 1) if value - n >= 1]
    found += [("mul", n, value * n) for n in (2, 3) if value * n < LIMIT]
    found += [("div", n, value // n) for n in (2, 3) if value % n == 0]
    return found


def _draw_chain(rng: random.Random) -> list[tuple[int, str, int, int]]:
    """A chain of (value, kind, operand, result) whose last result is the answer."""
    value = rng.randint(2, LIMIT - 1)
    chain = []
    for _ in range(rng.choice(OPERATIONS)):
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
    rule, thing = rng.choice(RULES), rng.choice(THINGS)
    in_order = rule == "in order"
    turns = FRIENDS if in_order else rng.sample(FRIENDS, len(chain))
    prompt = ["sam", "has", str(chain[0][0]), thing, "."]
    solution = []
    for name, (value, kind, operand, result) in zip(turns, chain, strict=False):
        phrase = rng.choice(_PHRASES.get((kind, operand)) or _PHRASES[kind, None])
        subject = () if phrase[0] in ("they", "half") else ("he",)
        prompt += [*subject, *(str(operand) if w == "#" else w for w in phrase), "."]
        solution += [name, str(value), SIGNS[kind], str(operand), "=", str(result)]
    prompt += ["how", "many", thing, "?", rule]
    solution += [_ANSWER, str(chain[-1][3])]
    return Problem(" ".join(prompt), " ".join(solution), chain[-1][3], in_order)


def held_out_problems(count: int, seed: int = 0) -> list[Problem]:
    """``count`` held-out problems, the same ones for the same seed."""
    rng = random.Random(f"held-out {seed}")
    return [draw_problem(rng, held_out=True) for _ in range(count)]


def read_answer(text: str) -> int | None:
    """The number after the last ``answer`` of a decoded solution, or None."""
    words = text.split()
    if _ANSWER not in words:
        return None
    tail = words[len(words) - words[::-1].index(_ANSWER) :]
    return int(tail[0]) if len(tail) == 1 and tail[0].isdigit() else None


def mistakes(problem: Problem, text: str) -> list[int]:
    """Places of the words of a decoded solution that are wrong, in order; none if it is right.

    A name is wrong where it breaks the prompt's rule, a second turn at its second place. Every
    other word has no alternative and has to be that of ``problem.solution``. A solution that ends
    too early is wrong at the place after its last word.
    """
    words, expected = text.split(), problem.solution.split()
    wrong, turns = [], set()
    for place in range(max(len(words), len(expected))):
        word = words[place] if place < len(words) else None
        if place < len(expected) - 2 and place % _SENTENCE == 0 and not problem.in_order:
            right = word in FRIENDS and word not in turns
            turns.add(word)
        else:
            right = place < len(expected) and word == expected[place]
        if not right:
            wrong.append(place)
        if word is None:
            break
    return wrong


def is_correct(problem: Problem, text: str) -> bool:
    """Whether a decoded solution is right in every word."""
    return not mistakes(problem, text)
