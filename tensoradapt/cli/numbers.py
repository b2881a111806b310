"""Numbers as people write them: `30k` parameters, an error of `1%`."""

from __future__ import annotations

import re

from tensoradapt.errors import RankError

UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def count(text: str | None) -> int | None:
    """What --max-parameters says: `30000`, `30_000`, `30,000`, `30k`, `1.5M`. Raises RankError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([kmb]?)", text.strip().lower())
    number = float(re.sub("[_,]", "", found[1])) * UNITS[found[2]] if found else 0.0
    if number < 1 or number != int(number):
        raise RankError(f"--max-parameters {text!r} is no number of parameters", expected="30000, 30_000, 30k or 1.5M")
    return int(number)


def share(text: str | None, option: str, more: str = "") -> float | None:
    """An error or a tolerance, `0.01` or `1%`; `more` is what else may stand there. Raises RankError."""
    if text is None:
        return None
    plain = text.strip()
    try:
        return float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        expected = f"a number such as 0.1, or 10%{more}"
        raise RankError(f"{option} {text!r} is no error", expected=expected) from None


def share_or_noise(text: str | None) -> float | str | None:
    """What --error says: a share, or the word noise. Raises RankError."""
    return text if text == "noise" else share(text, "--error", ", or noise")
