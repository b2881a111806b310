"""PEFT folders out: every delta as B A, the scale in the factors, re-opened and compared before it stands there.

Invariant: a folder that export_peft leaves behind is whole, and its deltas are the adapter's within the stated error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.errors import AdapterError, FileError, RankError, SpecError
from tensoradapt.io.base import identity
from tensoradapt.io.card import CARD
from tensoradapt.io.native import write_tensors
from tensoradapt.io.renamed import with_twins
from tensoradapt.io.saved import Savable, Saved, filled
from tensoradapt.paths import expand
from tensoradapt.peft.card import Exported, card
from tensoradapt.peft.config import CONFIG, FROM_PEFT, TASKS, WEIGHTS, config_of
from tensoradapt.peft.factors import Factored, balanced, nothing, truncated, unchanged
from tensoradapt.peft.keys import PREFIX
from tensoradapt.peft.lint import STACKING, Folder, check, tables_of
from tensoradapt.peft.modules import Module, assumed, modules_of
from tensoradapt.peft.notes import dilated, left_open, notes_of, parted
from tensoradapt.peft.opening import open_adapter
from tensoradapt.peft.patterns import keyed, target_modules
from tensoradapt.peft.reopen import errors_of
from tensoradapt.peft.siblings import siblings_of
from tensoradapt.peft.taken import taken_for_experts
from tensoradapt.peft.trained import Trained, check_head, trained_of
from tensoradapt.peft.within import seen_from_within
from tensoradapt.scan import Model, scan, told_by
from tensoradapt.sharded import sharded_by, written_once
from tensoradapt.sites import SiteMap
from tensoradapt.writing.folder import atomic_folder, check_free, claimed

FILES = (CONFIG, WEIGHTS, CARD)
LAYOUTS = ("portable", "compact")
Progress = Callable[[str, int, int], None]  # the item at work, how many are done, how many there are
# What rounding both factors to a dtype may change of a delta, relative to its norm.
DTYPES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclass(frozen=True)
class _Options:
    layout: str
    dtype: str
    consumer: str | None
    base_name: str | None
    task_type: str | None
    rank: int | None
    extras: bool
    zeros: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("layout", self.layout, LAYOUTS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("task_type", self.task_type, (None, *TASKS)),
        ):
            if value not in allowed:
                raise SpecError(f"no {name} {value!r}", expected=", ".join(str(a) for a in allowed if a))
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise RankError("a rank is a positive integer", got=repr(self.rank))

    def tell(self, item: str, done: int, total: int) -> None:
        """Report a step, where somebody listens."""
        if self.progress is not None:
            self.progress(item, done, total)


@dataclass(frozen=True)
class _Made:
    """What is to be written: modules with their factors, the config, and parameters that were trained whole."""

    factored: Mapping[Module, Factored]
    config: Mapping[str, Any]
    folder: Folder
    trained: Trained = field(default_factory=Trained)


def export_peft(  # noqa: PLR0913
    source: Savable | str | Path,
    out: str | Path,
    *,
    layout: str = "portable",
    dtype: str = "float32",
    model: Model | None = None,
    consumer: str | None = None,
    base_name: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
    rank: int | None = None,
    extras: bool = False,
    zeros: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write an adapter as a PEFT LoRA folder: `W += B A`, re-opened and compared module by module before it is there.

    `portable` gives every module one rank, padded with zeros, and alpha = rank: every server applies it alike;
    `compact` states ranks by pattern, for PEFT and newer vLLM. `model` (a module, config or folder; an attached
    adapter's own) lets target_modules be suffixes. `consumer` (vllm, llama.cpp, sglang, tgi, lorax) refuses what that
    server does; `zeros`, which the last three have in any case, writes unchanged modules and their siblings too;
    `rank` truncates, and makes a LoRA of formats of full matrix rank; `extras` writes modules trained whole.
    Raises AdapterError on deltas that LoRA cannot hold, FileError where the folder cannot be written or its deltas
    differ, SpecError on other options.
    """
    zeros = zeros or consumer in STACKING
    options = _Options(layout, dtype, consumer, base_name, task_type, rank, extras, zeros, progress)
    if not isinstance(source, Adapter):
        return _claimed(filled(open_adapter(source), "export"), expand(out), model, options, overwrite=overwrite)
    saved, live = filled(source.as_saved(), "export"), source._model[0]
    if model is None:
        model = scan(live) if sharded_by(live) else live  # whose modules cannot be copied
    write = partial(_claimed, saved, expand(out), model, options, overwrite=overwrite)
    return written_once(source.parameters(), write)


def _claimed(saved: Saved, out: Path, model: Model | None, options: _Options, *, overwrite: bool) -> Exported:
    with claimed(out):
        check_free(out, FILES, overwrite=overwrite)
        return _export(saved, out, options, model, overwrite=overwrite)


def _export(saved: Saved, out: Path, options: _Options, model: Model | None, *, overwrite: bool) -> Exported:
    if model is not None and not isinstance(model, nn.Module):
        module, sites = told_by(model)
        model = sites if module is None else module
    saved, model = seen_from_within(_exact(saved), model)
    whole = model if isinstance(model, nn.Module) else None
    known = None if model is None else scan(model)
    saved = saved if known is None else with_twins(saved, known)
    modules = modules_of(saved, known)
    made, zero = _make(saved, modules, whole, known, options)
    check(options.consumer, made.folder)
    if made.folder.patterns:
        warnings.warn("the compact layout is read right by PEFT and newer vLLM alone", stacklevel=4)
    with atomic_folder(out, FILES, overwrite=overwrite) as temporary:
        result = replace(_write(temporary, saved, made, whole, options), path=out)
        dropped = () if options.extras else tuple(saved.plan.extras)
        notes = (
            *notes_of(made.factored, made.folder, zero, dropped, known=known is not None),
            *dilated(made.factored, whole),
        )
        notes = (*notes, *left_open(assumed(saved, known)), *parted(saved, made.factored, known))
        result = replace(result, dropped=dropped, notes=notes)
        (temporary / CARD).write_text(card(result, made.config), encoding="utf-8")
    return result


def _exact(saved: Saved) -> Saved:
    """The adapter with its factors in float64 on the CPU. Raises FileError on tensors that have no finite values."""
    for key, tensor in saved.tensors.items():
        if tensor.is_meta or not tensor.numel() or not bool(torch.isfinite(tensor).all()):
            raise FileError(f"{key} has no finite values to export", got=tuple(tensor.shape), hint="load it first")
    wide = {
        key: tensor.detach().cpu() if key.startswith("extra.") else tensor.detach().to("cpu", torch.float64)
        for key, tensor in saved.tensors.items()
    }
    return replace(saved, tensors=wide)


def _found(
    saved: Saved, modules: Sequence[Module], known: SiteMap | None, options: _Options
) -> tuple[dict[Module, Factored], tuple[str, ...]]:
    """The modules that are written, with their factors, and those left out since their delta is zero."""
    found: dict[Module, Factored] = {}
    for module in modules:
        options.tell(f"factors of {module.path}", len(found), len(modules))
        found[module] = _factored(saved, module, options.rank)
    if not any(factored.rank for factored in found.values()):
        raise AdapterError("every delta is zero: there is nothing to export", got=saved.where)
    if options.zeros:
        return found | {m: nothing(*m.flat) for m in siblings_of(modules, known)}, ()
    zero = tuple(module.path for module, factored in found.items() if not factored.rank)
    return {module: factored for module, factored in found.items() if factored.rank}, zero


def _make(
    saved: Saved, modules: Sequence[Module], whole: nn.Module | None, known: SiteMap | None, options: _Options
) -> tuple[_Made, tuple[str, ...]]:
    """Factors, config and patterns; and the modules left out since their delta is zero."""
    found, zero = _found(saved, modules, known, options)
    ranks = {module.path: factored.rank or 1 for module, factored in found.items()}
    rank = max(ranks.values())
    taken = taken_for_experts(ranks, whole)
    patterns = _patterns(ranks, taken) if options.layout == "compact" else {}
    held = {path: saved.tensors[f"extra.{path}"] for path in saved.plan.extras} if options.extras else {}
    trained = trained_of(held, ranks, () if known is None else known.parameters)
    check_head(options.task_type, trained, () if known is None else known.parameters)
    base, revision = base_of(saved, options.base_name)
    config = config_of(
        rank,
        target_modules([path for path in ranks if path not in taken], None if known is None else _paths(known)),
        patterns=patterns,
        base=base,
        revision=revision,
        task=options.task_type,
        turned=all(module.kind == "linear" and module.layout == "in out" for module in found),
        trained=trained,
    ) | ({"target_parameters": [f"{path}.weight" for path in taken]} if taken else {})
    tables = tables_of(found, known, "" if whole is None else type(whole).__name__)
    return _Made(found, config, Folder(list(found), rank, patterns, trained.said, base, tables), trained), zero


def _patterns(ranks: Mapping[str, int], taken: Sequence[str]) -> dict[str, int]:
    """The ranks that are not the largest one, by what PEFT compares patterns with: a module, or its weight."""
    found = keyed({f"{path}.weight" if path in taken else path: rank for path, rank in ranks.items()})
    return {key: rank for key, rank in found.items() if rank != max(ranks.values())}


def _factored(saved: Saved, module: Module, rank: int | None) -> Factored:
    pair = module.factors(saved)
    if pair is not None and rank is None and FROM_PEFT in saved.plan.notes and len(module.parts) == 1:
        group, part = saved.sites[module.parts[0].path][0], module.parts[0]
        if set(group.diagram.nodes) == {"core_out", "core_in"} and not part.turned and group.scale:
            return unchanged(pair, group.scale)
    if pair is not None:
        return balanced(pair, rank)
    if rank is None:
        raise AdapterError(
            f"the delta of {module.path} is of full matrix rank: LoRA cannot hold it",
            got=str(saved.sites[module.parts[0].path][0].diagram),
            hint="rank=64 truncates it and states the error; or merge the adapter and serve the whole model",
        )
    return truncated(module.delta(saved), rank)


def _paths(known: SiteMap) -> set[str]:
    """Every module of a model that holds, or lies above, a parameter or a site."""
    owners = {name.rpartition(".")[0] for name in known.parameters} | {site.owner for site in known.sites}
    return {
        ".".join(path.split(".")[: k + 1]) for path in owners | set(known.refused) for k in range(path.count(".") + 1)
    }


def base_of(saved: Saved, given: str | None) -> tuple[str | None, str | None]:
    """The base for the config, and its revision: what was given, or a hub's id.

    Readers load what stands there, so that a folder's own name, which leads nowhere, does not.
    """
    said = identity(saved.plan, saved.base)
    name = given if given is not None else said["name"] if said["hub"] else None
    return name, said["revision"] or None if name == said["name"] else None


def _tensors(made: _Made, dtype: torch.dtype, *, pad: bool) -> dict[str, Tensor]:
    """Every key of the file with its tensor: A and B in PEFT's shapes, padded with zeros to one rank."""
    found: dict[str, Tensor] = {}
    for module, factored in made.factored.items():
        more = made.folder.rank - factored.rank if pad else int(not factored.rank)
        a = torch.nn.functional.pad(factored.a, (0, 0, 0, more)).to(dtype)
        b = torch.nn.functional.pad(factored.b, (0, more)).to(dtype)
        if module.kind == "conv":
            kernel = module.shape[3:] if module.dims == 1 else module.shape[2:]
            a, b = a.reshape(-1, module.shape[1], *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        names = ("lora_embedding_A", "lora_embedding_B")
        names = names if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        found |= {f"{PREFIX}{module.path}.{name}": t.contiguous() for name, t in zip(names, (a, b), strict=True)}
    whole = made.trained
    return found | {f"{PREFIX}{whole.names[path]}": tensor.contiguous() for path, tensor in whole.tensors.items()}


def _write(folder: Path, saved: Saved, made: _Made, model: nn.Module | None, options: _Options) -> Exported:
    """Weights, then the config; read back and compared. Raises FileError where a delta is not what it was."""
    tensors = _tensors(made, getattr(torch, options.dtype), pad=not made.folder.patterns)
    write_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(made.config, indent=2) + "\n", encoding="utf-8")
    reader, errors = errors_of(folder, list(made.factored), saved, made.trained, model, options.tell)
    rows = {m.path: {"rank": f.rank, "error": errors[m.path]} for m, f in made.factored.items()}
    for module, factored in made.factored.items():
        if not errors[module.path] <= DTYPES[options.dtype] + factored.left * 1.01:
            raise FileError(
                f"the delta of {module.path} is not what it was in {options.dtype}: nothing was written",
                got=f"relative error {errors[module.path]:.2e}",
                expected=f"at most {DTYPES[options.dtype]:.0e}",
                hint="export in float32",
            )
    return Exported(folder, options.layout, options.dtype, made.folder.rank, rows, reader)
