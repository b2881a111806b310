"""Names of one model's tensors: without the parts of wrappers, and in two places of which one has a prefix.

Invariant: plain names are distinct; a prefix is only found where it brings most of the smaller side together, and more
than the plain names do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from tensoradapt.errors import FileError

ENOUGH = 0.8  # the share of the smaller side's names that a prefix must bring together
SAMPLES = 64  # names that prefixes are looked for with
# What torch.compile, FSDP, activation checkpointing and Lightning put between two names of a model.
PARTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"))
# What PEFT's layers hold: the module that they stand around, and the factors of its families.
PEFT_PARTS = frozenset(
    ("base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_E")
    + ("hada_w1_a", "hada_w1_b", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "vera_lambda_b", "vera_lambda_d")
    + ("ia3_l", "oft_R", "oft_r", "boft_R", "fourierft_spectrum", "bone_block", "miss_block", "hra_u")
)
AROUND = "module."  # what DataParallel and averaged models put before every name
COUNTER = "n_averaged"  # what an averaged model has beside the model


def plain(name: str) -> str:
    """A name without the parts of wrappers, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in PARTS)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names as they are written -> the model's own: without wrappers, and without `module.` where all names have it.

    Raises FileError where two names become one.
    """
    return distinct(without_around({name: plain(name) for name in names}))


def without_around(found: dict[str, str]) -> dict[str, str]:
    """The names without `module.` in front, as often as every one of them has it."""
    inside = [name for name in found.values() if name != COUNTER]
    while inside and all(name.startswith(AROUND) for name in inside):
        found = {name: own.removeprefix(AROUND) for name, own in found.items()}
        inside = [name for name in found.values() if name != COUNTER]
    return found


def distinct(found: dict[str, str]) -> dict[str, str]:
    """The same names. Raises FileError where two of them mean one."""
    seen: dict[str, str] = {}
    for name, own in found.items():
        if seen.setdefault(own, name) != name:
            raise FileError(
                f"{seen[own]} and {name} are both {own} without the names of wrappers",
                expected="one tensor of each name",
                hint="save the state of one model: the wrapped one, or the plain one",
            )
    return found


def upwards(path: str) -> Iterator[str]:
    """A path, and all that it lies in, to the model itself, whose path is empty."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def unmerged(names: Iterable[str]) -> str | None:
    """The first name of a tensor that PEFT holds beside the model's own, or of a weight that it has put aside."""
    return next((name for name in names if set(name.split(".")) & PEFT_PARTS), None)


def not_merged(where: str, name: str) -> FileError:
    """The error on a model whose adapters PEFT has not merged."""
    return FileError(
        f"{where} holds a PEFT adapter that is not merged",
        got=name,
        expected="the weights of one model, under their own names",
        hint="merge it first, model.merge_and_unload(), and save that; or give the adapter's folder as an adapter",
    )


@dataclass(frozen=True)
class Shift:
    """From one side's names to the other's: a prefix taken off, or put before."""

    prefix: str = ""
    strip: bool = False

    def __call__(self, name: str) -> str:
        """The other side's name; an empty one where the prefix is to be taken off and not there."""
        if not self.strip:
            return self.prefix + name
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else ""


def shift(names: Collection[str], others: Collection[str], prefix: str = "auto", *, tell: bool = False) -> Shift:
    """How names become the others' names; not at all where two prefixes would do, which `tell` makes an error.

    Raises FileError on a given prefix that neither side has.
    """
    if prefix == "auto":
        return _found(names, others, tell)
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    found = [Shift(prefix, strip=True), Shift(prefix)]
    plain = _matched(Shift(), names, others) >= ENOUGH * min(len(names), len(others))
    if prefix and plain and any(name.startswith(prefix) for name in names):
        return Shift()  # both have it since their names are those of modules
    if prefix and not any(_matched(by, names, others) for by in found):
        raise FileError(f"no name is the other side's with {prefix!r} before it", hint='prefix="auto" looks for one')
    return max(found, key=lambda by: _matched(by, names, others)) if prefix else Shift()


def _found(names: Collection[str], others: Collection[str], tell: bool) -> Shift:
    candidates = [Shift(prefix, strip=True) for prefix in _prefixes(names, others)]
    candidates += [Shift(prefix) for prefix in _prefixes(others, names)]
    best = max(candidates, key=lambda by: _matched(by, names, others), default=Shift())
    enough = max(_matched(Shift(), names, others) + 1, ENOUGH * min(len(names), len(others)))
    if _matched(best, names, others) < enough:
        return Shift()
    same = [by for by in candidates if _matched(by, names, others) == _matched(best, names, others)]
    images = {by: {(name, by(name)) for name in names if by(name) in others} for by in same}
    other = next((by for by in same if images[by] != images[best]), None)
    if other is not None and tell:
        raise FileError(
            f"{len(images[best])} names are the other side's with {best.prefix!r} before, or with {other.prefix!r}",
            hint=f'prefix="{best.prefix.rstrip(".")}" (--prefix) says which of the two parts is meant',
        )
    return best if other is None else Shift()


def as_others(
    names: Collection[str], others: Collection[str], prefix: str = "auto", *, only_longer: bool = False
) -> dict[str, str]:
    """Names -> what others call them, with the prefix of one side; those that have no counterpart stay.

    `only_longer`: names become longer, or stay. Raises FileError where two prefixes would do.
    """
    by = shift(names, others, prefix, tell=True)
    if not by.prefix or (only_longer and by.strip):
        return {}
    return {name: other for name in names if (other := by(name)) in others and other not in names}


def sole(names: Collection[str], others: Collection[str]) -> Shift | None:
    """The one prefix, or none at all, with which every name is among the others; None where there is no such, or two.

    Two towers of one model have the same names behind their own prefixes: which of them is meant nobody can say.
    """
    if all(name in others for name in names):
        return Shift()
    longer = sorted(names, key=len)[-1:]
    put = {other.removesuffix(name) for name in longer for other in others if other.endswith(f".{name}")}
    taken = {name.removesuffix(other) for name in longer for other in others if other and name.endswith(f".{other}")}
    candidates = [*map(Shift, put), *(Shift(prefix, strip=True) for prefix in taken)]
    found = [by for by in candidates if all(by(name) in others for name in names)]
    return found[0] if len(found) == 1 else None


def _matched(by: Shift, names: Collection[str], others: Collection[str]) -> int:
    return sum(by(name) in others for name in names)


def _prefixes(longer: Collection[str], shorter: Collection[str]) -> Iterator[str]:
    """What most often stands before one of the shorter names among the longer ones."""
    sample = list(shorter)[:: max(1, len(shorter) // SAMPLES)]
    counts = Counter(
        name.removesuffix(part) for part in sample for name in longer if part and name.endswith(f".{part}")
    )
    return (prefix for prefix, _ in counts.most_common(4))
