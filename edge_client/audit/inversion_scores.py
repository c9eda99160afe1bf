"""How good a guess at the tokens of a text is, and how likely each token is to be in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from farfield.protocols.audit.finding import Interval

Values = NDArray[np.float64]

RIDGE = 1.0
"""How far weights are held back: a text or two of little use must not make a clue count for much."""


def precision(scores: Values, present: Values) -> float:
    """The share of right tokens among the likeliest, as many as there are: then recall is the same."""
    count = int(present.sum())
    return float(present[np.argsort(-scores, kind="stable")[:count]].mean())


def at_half(chances: Values, present: Values) -> tuple[float | None, float]:
    """Precision and recall of the tokens that are likelier there than not; no precision where there is none such."""
    guessed = chances > 0.5
    right = float((guessed * present).sum())
    return (right / float(guessed.sum()) if guessed.any() else None), right / float(present.sum())


def rouge(guess: Sequence[int], truth: Sequence[int]) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), of tokens in the place of words."""
    one, two = (_overlap(_grams(guess, size), _grams(truth, size)) for size in (1, 2))
    return one, two, _f1(_common(guess, truth), len(guess), len(truth))


def interval(values: Sequence[float]) -> Interval | None:
    """Student's 95 % interval of their mean; None of fewer than two."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    middle = float(np.mean(values))
    return Interval(low=middle - half, high=middle + half)


@dataclass(frozen=True, slots=True)
class Presence:
    """Weights by which clues say how likely a token is to be in a text: a logistic regression."""

    weights: Values

    @classmethod
    def learnt(cls, clues: Sequence[Values], present: Sequence[Values]) -> Presence:
        """From texts that are known.

        Args:
            clues: float64[vocabulary, clues] of each text.
            present: 1 for tokens that are in it, else 0; float64[vocabulary].
        """
        inputs, wanted = _with_one(np.concatenate(clues)), np.concatenate(present)
        weights = np.zeros(inputs.shape[1])
        held = RIDGE * np.eye(len(weights))
        for _ in range(25):  # Newton's steps; a few are enough
            chances = _logistic(inputs @ weights)
            slope = inputs.T @ (chances - wanted) + held @ weights
            bend = (inputs * (chances * (1 - chances))[:, None]).T @ inputs + held
            weights = weights - np.linalg.solve(bend, slope)
        return cls(weights)

    def chances(self, clues: Values) -> Values:
        """float64[vocabulary]."""
        return _logistic(_with_one(clues) @ self.weights)


def _with_one(clues: Values) -> Values:
    return np.concatenate([clues, np.ones((len(clues), 1))], axis=1)


def _logistic(values: Values) -> Values:
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))


def _grams(tokens: Sequence[int], size: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))


def _overlap(guess: Counter[tuple[int, ...]], truth: Counter[tuple[int, ...]]) -> float:
    return _f1((guess & truth).total(), guess.total(), truth.total())


def _f1(right: int, guessed: int, wanted: int) -> float:
    return 2 * right / (guessed + wanted) if guessed + wanted else 0.0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for item in one:
        above = list(row)
        for column, candidate in enumerate(other, 1):
            row[column] = above[column - 1] + 1 if item == candidate else max(above[column], row[column - 1])
    return row[-1]
