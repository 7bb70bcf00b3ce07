"""Writes outputs/comparisons.jsonl: questions, each with a right and a wrong answer."""

import itertools
import json
import random
from pathlib import Path

CONSONANTS, VOWELS = "bcdfghklmnprst", "aeiou"


def main() -> None:
    """Words in small or in capital letters, whichever the question asks for."""
    chance = random.Random(0)
    words = ["".join(letters) for letters in itertools.product(CONSONANTS, VOWELS, CONSONANTS)]
    lines = []
    for word in chance.sample(words, 800):
        question, right, wrong = chance.choice(
            [("repeat", word, word.upper()), ("upper", word.upper(), word)]
        )
        record = {"prompt": f"{question} {word}", "chosen": right, "rejected": wrong}
        lines.append(json.dumps(record) + "\n")
    path = Path("outputs/comparisons.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
