"""From a file of names to minibatches: reading, vocabulary, split, windows and sequences of tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from names.errors import InputError, shorten

DATA = Path(__file__).parents[1] / "data" / "names.txt"
BOUNDARY = "."  # token 0: it fills the context before a name and ends the name
IGNORED = -100  # the target at a place after the end of a name: CrossEntropy ignores it


@dataclass(frozen=True)
class Vocabulary:
    """The characters of the data in sorted order, after the boundary: a character's token is its position."""

    characters: str

    @classmethod
    def of(cls, names: Sequence[str]) -> Vocabulary:
        """Collect the characters of some names."""
        return cls(BOUNDARY + "".join(sorted(set("".join(names)))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The tokens of some text."""
        return [self.characters.index(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return "".join(self.characters[token] for token in tokens)


@dataclass(frozen=True)
class Split:
    """Tokens x (N, T) and targets: y (N,), the token after each row, or y (N, T), the token after each place."""

    x: Tensor
    y: Tensor

    @property
    def targets(self) -> int:
        """The number of targets that count."""
        return int((self.y != IGNORED).sum())


def read_names(path: Path) -> list[str]:
    """The names in a UTF-8 text file, one per line, without blank lines and the spaces around a name."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a UTF-8 text file; expected one name per line") from None
    if "\0" in text:
        raise InputError(f"{path} is a binary file; expected text, one name per line")
    names = [line.strip() for line in text.splitlines()]
    for number, name in enumerate(names, 1):
        if BOUNDARY in name:
            raise InputError(
                f"{path}, line {number}: {BOUNDARY!r} marks the end of a name and cannot be in one: {shorten(name)}"
            )
    names = [name for name in names if name]
    if len(names) < 3:
        raise InputError(
            f"{path} has {len(names)} name(s); at least 3 are needed, one each to train, validate and test"
        )
    return names


def fingerprint(names: Sequence[str]) -> str:
    """What tells these names, in this order, from any others."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def split_names(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Shuffle the names, then divide them 80 / 10 / 10; each part gets at least one name."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    count = len(shuffled)
    test = max(1, count - int(0.9 * count))
    val = max(1, int(0.9 * count) - int(0.8 * count))
    train = count - val - test
    return {"train": shuffled[:train], "val": shuffled[train : train + val], "test": shuffled[train + val :]}


def windows(names: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Split:
    """One row per character of each name, and one for the boundary after it: the `block_size` tokens before it."""
    x, y = [], []
    for name in names:
        context = [0] * block_size
        for token in vocabulary.encode(name + BOUNDARY):
            x.append(context)
            y.append(token)
            context = [*context[1:], token]
    return Split(torch.tensor(x), torch.tensor(y))


def sequences(names: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Split:
    """One row per name: the boundary and the name, cut off at `block_size`, with the next token at each place."""
    width = min(block_size, max(map(len, names)) + 1)
    x = torch.zeros(len(names), width, dtype=torch.int64)
    y = torch.full((len(names), width), IGNORED)
    for row, name in enumerate(names):
        tokens = vocabulary.encode(BOUNDARY + name + BOUNDARY)[: width + 1]
        x[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        y[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
    return Split(x, y)


def minibatch(split: Split, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `size` rows with replacement: x, and y as the loss takes it, one target per prediction."""
    xs, ys = minibatches(split, 1, size, generator)
    return xs[0], ys[0]


def minibatches(split: Split, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw K = `count` minibatches of B = `size` rows: xs (K, B, T), and ys (K, B) or (K, B T)."""
    rows = torch.randint(0, split.y.shape[0], (count, size), generator=generator).to(split.y.device)
    return split.x[rows], split.y[rows].flatten(1)
