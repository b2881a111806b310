"""What to know of a folder that was exported, beside its errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from tensoradapt.extract.words import counted
from tensoradapt.io.saved import Saved
from tensoradapt.peft.factors import Factored
from tensoradapt.peft.lint import Folder, advice
from tensoradapt.peft.modules import Module
from tensoradapt.scan import module_at
from tensoradapt.sites import SiteMap

Factors = Mapping[Module, Factored]


def notes_of(
    factored: Factors, folder: Folder, zero: Sequence[str], dropped: Sequence[str], *, known: bool
) -> tuple[str, ...]:
    """What to know of a folder, beside its errors."""
    left = [f"{module.path} by {f.left:.1%}" for module, f in factored.items() if f.left]
    twins = [
        module.path for module in factored if module.parts and module.parts[0].path.partition("[")[0] != module.path
    ]
    return (
        *advice(folder),
        *([f"truncated: {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}"] if left else []),
        *([f"left out, their delta is zero: {', '.join(zero)}"] if zero else []),
        *(
            [f"{', '.join(twins)} tied to another module: PEFT, too, adds to one weight twice when it merges"]
            if twins
            else []
        ),
        *([] if known else [_names(factored)]),
        *(["parameters trained whole are not in the folder: extras=True writes them"] if dropped else []),
    )


def parted(saved: Saved, factored: Factors, known: SiteMap | None) -> Iterator[str]:
    """What a reader does with a module that is tied to others which the folder leaves out."""
    tied = {site.owner: site.aliases for site in known.sites} if known else {}
    written = {module.path for module in factored}
    for site in (placement.site for _, placement in saved.sites.values()):
        others = [twin for twin in tied.get(site.owner, site.aliases) if twin not in written]
        if others and site.owner in written:
            yield (
                f"{site.owner} is tied to {', '.join(others)}, not in the folder: PEFT, as the adapter here, adds to "
                f"{site.owner} alone, and changes all of them when it merges"
            )


def _names(factored: Factors) -> str:
    """What to say of names that were taken as the adapter has them: PEFT looks for modules of just these names."""
    return (
        f"PEFT finds modules by name: load it onto a model that has {next(iter(factored)).path}; "
        "given another model (--model), the export has the names of that one"
    )


def left_open(paths: Sequence[str]) -> tuple[str, ...]:
    """A note of weights whose layout nothing tells: PEFT adds to the wrong sides of a Conv1D that they are of."""
    first = f"{counted(len(paths), 'weight')} ({', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''})"
    return (f"{first}: taken to be stored as an nn.Linear is, outputs first; model= tells",) if paths else ()


def dilated(factored: Factors, model: nn.Module | None) -> tuple[str, ...]:
    """A note of convolutions whose dilation PEFT's own convolution does not have (as of 0.21)."""
    if model is None:
        return ()
    convolutions = {m.path: module_at(model, m.path) for m in factored if m.kind == "conv"}
    wide = [path for path, module in convolutions.items() if set(module.dilation) != {1}]  # type: ignore[arg-type]
    return (f"PEFT forgets the dilation of {', '.join(wide)} unless it merges",) if wide else ()
