"""What a user does with a model, each judged by the model's own outputs: functions of a specimen and an empty folder.

A job returns where everything is right; it raises Wrong where a result is not, Unavailable where the oracle itself
cannot do it, and lets every refusal of the library through. `without` has the weights that it asked to leave out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo.specimen import RANK, Specimen, Unavailable, Wrong, agree, change, distance, loss_of

import tensoradapt as ta

Job = Callable[[Specimen, Path, Sequence[str]], None]


def plan(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """Every weight in its own shape, from the live model and from its folder alike."""
    spec = everything(it, without)
    live = ta.plan(spec, it.base)
    shapes = {site.path: site.shape for group in live.groups for site in sites_of(group)}
    for path, shape in shapes.items():
        name, _, index = path.partition("[")
        weight = dict(it.base.named_parameters(remove_duplicate=False))[named(it.base, name)]
        weight = weight[0] if index else weight
        sides = sorted(weight.shape[:2]) if weight.dim() != 4 else list(weight.shape[:2])
        if sorted(shape[:2]) != sorted(sides):
            raise Wrong(f"{path} is planned as {shape}, and is {tuple(weight.shape)}")
        if type(owner(it.base, name)) in (nn.Linear, nn.Conv2d) and tuple(shape) != tuple(weight.shape):
            raise Wrong(f"{path} is planned as {shape}, and is {tuple(weight.shape)}")
    if not hasattr(it.base, "config"):
        return
    stored = ta.plan(spec, it.base_folder)
    if {s.path: s.shape for g in stored.groups for s in sites_of(g)} != shapes:
        raise Wrong("the plan of the folder is not that of the model")


def attach(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """A fresh adapter leaves every output as it was, bit for bit."""
    model = it.fresh()
    ta.attach(model, everything(it, without))
    frozen = it.fresh().requires_grad_(False)  # torch takes other kernels for weights that are trained
    error = distance(slowly(it, model), slowly(it, frozen))
    if error:
        raise Wrong(f"a fresh adapter changes the output by {error:.2g} of {it.scale:.2g}")


def train(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """A backward pass reaches every factor whose weight has an effect, and a step along it lowers the loss."""
    model = it.fresh()
    adapter = ta.attach(model, everything(it, without))
    shake(adapter)
    used = it.used
    loss = loss_of(it.called(model.train(it.mode)))
    loss.backward()
    factors = [p for p in adapter.parameters() if p.requires_grad]
    for group in adapter.groups.values():
        needed = any(named(it.base, path.partition("[")[0]) in used and "[" not in path for path in group.paths)
        still = [node for node, p in adapter.factors(group.name).items() if p.grad is None or not p.grad.any()]
        if needed and still:
            raise Wrong(f"no gradient in {still} of {group.paths[0]}")
    square = sum(float(p.grad.square().sum()) for p in factors if p.grad is not None)
    with torch.no_grad():
        for p in factors:
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-3 * float(loss) / square)
    after = float(loss_of(it.outputs(model)))  # in the same mode
    if not after < float(loss):
        raise Wrong(f"the loss went from {float(loss):.6g} to {after:.6g}")


def merge(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """Merged into the weights, the model gives what it gave with the adapter attached."""
    model, adapter = attached(it, without)
    wanted = it.outputs(model)
    adapter.merge()
    agree(it.outputs(model), wanted, it.before, "merged against attached")


def restore(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """Unmerged and detached, the model is the base bit for bit."""
    model, adapter = attached(it, without)
    adapter.merge()
    adapter.unmerge()
    adapter.detach()
    if distance(it.outputs(model), it.before):
        raise Wrong("the base is not what it was")
    now, then = dict(model.named_parameters()), dict(it.base.named_parameters())
    if list(now) != list(then) or any(not torch.equal(now[name], then[name]) for name in then):
        raise Wrong("the base's weights are not what they were")
    if any(now[name].requires_grad != then[name].requires_grad for name in then):
        raise Wrong("what is trained is not what it was")


def save(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """Saved, and loaded onto another copy, the adapter does the same."""
    model, adapter = attached(it, without)
    wanted = it.outputs(model)
    again = it.fresh()
    ta.load(adapter.save(folder), again)
    agree(it.outputs(again), wanted, it.before, "loaded against saved")


def analyze(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """Every changed weight is listed by its name in the model, with its norm."""
    report = ta.analyze(it.base_folder, it.tuned_folder, candidates=False)
    then, now = names_of(it.base), names_of(it.tuned)
    for name in it.matrices:
        delta = (now[name][0].double() - then[name][0].double()).detach()
        paths = {n.removeprefix("module.").removesuffix(".weight") for n in then[name][1]}
        own = [row for path, row in report.sites.items() if path.partition("[")[0] in paths]
        if not own and name in report.match["refused"]:
            raise Partly(report.match["refused"][name])
        if not own:
            raise Wrong(f"{name} changed, and is not listed")
        norm = sum(row.norm**2 for row in own) ** 0.5
        if abs(norm - float(delta.norm())) > 1e-3 * float(delta.norm()):
            raise Wrong(f"{name} changed by {float(delta.norm()):.4g}, and is listed with {norm:.4g}")


def from_folders(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """What is extracted from two folders makes the tuned model of the base."""
    loaded(it, of_folders(it))


def from_modules(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """The same from two live models."""
    loaded(it, extracted(it.base, it.tuned, folder))


def from_states(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """The same from two state dicts."""
    loaded(it, extracted(it.base.state_dict(), it.tuned.state_dict(), folder))


def from_wrapped(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """The same where the names of both sides have the prefixes of wrappers, each its own."""
    base = {f"module.{name}": tensor for name, tensor in it.base.state_dict().items()}
    tuned = {f"_orig_mod.module.{name}": tensor for name, tensor in it.tuned.state_dict().items()}
    loaded(it, extracted(base, tuned, folder))


def merge_extracted(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """The extracted adapter, merged into the base's folder, is the tuned model for transformers."""
    ta.merge_folder(it.base_folder, of_folders(it).path, folder / "merged")
    agree(it.outputs(it.opened(folder / "merged")), it.outputs(it.tuned), it.before, "merged folder against tuned")


def merge_attached(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """An adapter that was attached and saved, merged into the model's own folder."""
    model, adapter = attached(it, without)
    wanted = it.outputs(model)
    ta.merge_folder(it.base_folder, adapter.save(folder / "adapter"), folder / "merged")
    agree(it.outputs(it.opened(folder / "merged")), wanted, it.before, "merged folder against attached")


def export(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """Exported, and opened by PEFT on the real model, the adapter does the same.

    Where that is refused, what is left without the modules of the names that the refusal tells has to go through.
    """
    paths, reasons = exportable(it), []
    for k in range(12):
        try:
            _exported(it, folder / str(k), paths)
        except ta.TensorAdaptError as error:
            roles = {
                path.rpartition(".")[2]
                for path in paths
                if re.search(rf"(?<![\w.]){re.escape(path)}(?![\w.])", str(error))
            }
            left = [path for path in paths if path.rpartition(".")[2] not in roles]
            left = left if roles else [path for path in paths if path in known_to_peft(it)]
            if not left or left == paths:
                raise
            paths, reasons = left, [*reasons, str(error).partition("\n")[0]]
        else:
            break
    if reasons:
        raise Without("; ".join(dict.fromkeys(reasons)))


def _exported(it: Specimen, folder: Path, paths: list[str]) -> None:
    if not paths:
        raise Unavailable("PEFT adapts no module of it")
    model, adapter = attached(it, (), paths)
    wanted = it.outputs(model)
    ta.export_peft(adapter, folder)
    opened = peft.PeftModel.from_pretrained(it.fresh(), folder).base_model.eval()
    agree(slowly(it, opened), wanted, it.before, "PEFT against attached")


def import_(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """A LoRA that PEFT made, loaded onto the model, does what it does in PEFT."""
    wanted = made_by_peft(it, folder / "peft", list(dict.fromkeys([*known_to_peft(it), *tied_to_peft(it)])))
    model = it.fresh()
    ta.load(ta.import_peft(folder / "peft"), model)
    agree(it.outputs(model), wanted, it.before, "imported against PEFT")


def merge_imported(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """A LoRA that PEFT made, merged into the model's folder; not on tied weights, which have two deltas in PEFT."""
    tied = tied_to_peft(it)
    wanted = made_by_peft(it, folder / "peft", [path for path in known_to_peft(it) if path not in tied])
    ta.merge_folder(it.base_folder, ta.import_peft(folder / "peft", model=it.base), folder / "merged")
    agree(it.outputs(it.opened(folder / "merged")), wanted, it.before, "merged folder against PEFT")


def ends(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """The embedding and the head, extracted by their names, tied or not."""
    paths = ends_of(it)
    tuned = it.fresh()
    change({f"{path}.weight": p for p, path in {tuned.get_submodule(path).weight: path for path in paths}.items()})
    wanted = it.outputs(tuned)
    for path in paths:  # each is a name of the weight, also where they are one
        alone = it.fresh()
        change({path: alone.get_submodule(path).weight})
        result = extracted(it.base, alone, folder / path, targets=[path])
        model = it.fresh()
        ta.load(result.path, model)
        agree(it.outputs(model), it.outputs(alone), it.before, f"{path} against tuned")
    result = extracted(it.base, tuned, folder / "both", targets=paths)
    model = it.fresh()
    ta.load(result.path, model)
    agree(it.outputs(model), wanted, it.before, "both against tuned")


def whole(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """With no targets, and norms and biases changed too: what is not held is named, with its share of the change."""
    tuned = it.fresh()
    change({name: p for name, p in tuned.named_parameters() if name in it.matrices})
    nudge(tuned, set(it.matrices))
    result = ta.extract(it.base, tuned, ta.preset("lora", rank=RANK), folder)
    if result.path is None:
        raise Wrong(f"nothing was extracted: {result}")
    model = it.fresh()
    adapter = ta.load(result.path, model)
    adapter.merge()
    sides = [dict(m.named_parameters()) for m in (it.base, model, tuned)]
    change_of = {name: squares(p, sides[2][name]) for name, p in sides[0].items()}
    left = {name: squares(sides[1][name], sides[2][name]) for name in sides[0]}
    error = (sum(left.values()) / sum(change_of.values())) ** 0.5
    if result.whole_error is None or abs(error - result.whole_error) > 1e-3:
        raise Wrong(f"the error is {error:.4g} over the whole change, and {result.whole_error} is told")
    told = {name.removesuffix(".weight") for name in (*result.change.not_held, *result.change.unmeasured)}
    silent = [n for n in left if left[n] > 1e-4 * change_of[n] and n.removesuffix(".weight") not in told]
    if silent:
        raise Wrong(f"not held, and not named: {', '.join(silent[:3])}")


def verify(it: Specimen, folder: Path, without: Sequence[str]) -> None:
    """The extracted adapter stands for the whole change."""
    found = ta.verify(of_folders(it).path, it.base_folder, it.tuned_folder)
    if not found.whole_error < 1e-3:
        raise Wrong(f"verify says {found.whole_error:.3g} of an adapter that holds everything")


JOBS: dict[str, Job] = {
    **{"plan": plan, "attach": attach, "train": train, "merge": merge, "restore": restore, "save": save},
    **{"analyze": analyze, "from folders": from_folders, "from modules": from_modules, "from states": from_states},
    **{"from wrapped": from_wrapped, "merge extracted": merge_extracted, "merge attached": merge_attached},
    **{"export": export, "import": import_, "merge imported": merge_imported, "ends": ends, "whole": whole},
    **{"verify": verify},
}


# -- steps of several jobs ------------------------------------------------------------------------------------------


def everything(it: Specimen, without: Sequence[str], paths: Sequence[str] = ()) -> ta.Spec:
    """A LoRA on every matrix of the model, by path, but those of fused recurrent networks."""
    fused = {path for path, module in it.base.named_modules() if isinstance(module, nn.RNNBase)}
    mine = [name for name in it.matrices if name.rpartition(".")[0] not in fused]
    names = [n for name in mine for n in (name, *it.tied.get(name, ()))]
    targets = paths or [name.removesuffix(".weight") for name in names]
    return ta.preset("lora", rank=RANK, targets=list(targets), exclude=list(without))


def attached(it: Specimen, without: Sequence[str], paths: Sequence[str] = ()) -> tuple[nn.Module, ta.Adapter]:
    """A copy of the model with an adapter that does something."""
    model = it.fresh()
    adapter = ta.attach(model, everything(it, without, paths))
    shake(adapter)
    return model, adapter


@torch.no_grad()
def shake(adapter: ta.Adapter) -> None:
    """Move every trained factor off its start."""
    generator = torch.Generator().manual_seed(2)
    for p in adapter.parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))


@torch.no_grad()
def nudge(model: nn.Module, but: set[str]) -> None:
    """Change everything else: norms, biases, tables of more than two axes."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if name not in but and p.requires_grad:
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))


@cache
def of_folders(it: Specimen) -> ta.Extraction:
    """What is extracted from the two folders, once for all jobs."""
    return extracted(it.base_folder, it.tuned_folder, it.place / "extracted")


def extracted(base: Any, tuned: Any, folder: Path, **targets: Any) -> ta.Extraction:
    """A LoRA of the rank of the change on every weight that differs, or on the targets."""
    result = ta.extract(base, tuned, ta.preset("lora", rank=RANK, **targets), folder, overwrite=True)
    if result.change.not_held:
        raise Partly(", ".join(sorted({row["reason"] for row in result.change.not_held.values()})))
    if result.path is None:
        raise Wrong(f"nothing was extracted: {result}")
    if result.relative_error > 1e-3:
        raise Wrong(f"a change of rank {RANK} was fitted to {result.relative_error:.3g}")
    return result


def loaded(it: Specimen, result: ta.Extraction) -> None:
    """Load onto the base what was extracted."""
    model = it.fresh()
    ta.load(result.path, model)
    agree(it.outputs(model), it.outputs(it.tuned), it.before, "loaded against tuned")


class Without(Exception):
    """Right, but for what is refused by name; the message is the refusal's."""


class Partly(Exception):
    """The adapter says that it leaves out a part of the change, and why."""


def made_by_peft(it: Specimen, folder: Path, paths: list[str]) -> list[torch.Tensor]:
    """Write a LoRA by PEFT on some modules; returns what the model gives with it."""
    if not paths:
        raise Unavailable("PEFT adapts no module of it")
    model = adapted_by_peft(it, paths)
    outputs = slowly(it, model.base_model)
    try:
        model.save_pretrained(folder)
    except NotImplementedError:  # it asks models without an embedding for one
        model.save_pretrained(folder, save_embedding_layers=False)
    try:
        again = slowly(it, peft.PeftModel.from_pretrained(it.fresh(), folder).base_model.eval())
    except Exception as error:
        raise Unavailable(f"PEFT does not open what it saved: {error}") from error
    if distance(again, outputs) > 1e-5 * it.scale:
        raise Unavailable("PEFT does not load what it saved")
    return outputs


def adapted_by_peft(it: Specimen, paths: Sequence[str]) -> peft.PeftModel:
    config = peft.LoraConfig(r=RANK, lora_alpha=2, target_modules=list(paths), init_lora_weights=False)
    torch.manual_seed(4)
    return peft.get_peft_model(it.fresh(), config).eval()


def exportable(it: Specimen) -> list[str]:
    """The modules of kinds that PEFT adapts, but for those whose replacement breaks the model's own code."""
    return [path for path in it.modules if _tried(it)[path] != "called"]


def known_to_peft(it: Specimen) -> list[str]:
    """The modules that PEFT itself adapts without an error."""
    return [path for path in it.modules if not _tried(it)[path]]


def tied_to_peft(it: Specimen) -> list[str]:
    """The modules that PEFT adapts, whose weight another module has too: it has a delta for each."""
    names = {name.removesuffix(".weight") for first, others in it.tied.items() for name in (first, *others)}
    return [path for path in it.modules if path in names and _tried(it)[path] in ("", "merged")]


@cache
def _tried(it: Specimen) -> dict[str, str]:
    """At which step PEFT fails on every module: none, `made`, `called` or `merged`; those of one name together."""
    if not _step(it, list(it.modules)):
        return dict.fromkeys(it.modules, "")
    roles: dict[str, list[str]] = {}
    for path in it.modules:
        roles.setdefault(path.rpartition(".")[2], []).append(path)
    return {path: step for paths in roles.values() for step in [_step(it, paths)] for path in paths}


def _step(it: Specimen, paths: list[str]) -> str:
    try:
        model = adapted_by_peft(it, paths)
    except Exception:  # whatever PEFT says
        return "made"
    try:
        outputs = slowly(it, model.base_model)
    except Exception:  # whatever the model makes of PEFT's modules
        return "called"
    try:
        agree(slowly(it, model.merge_and_unload()), outputs, it.before, "merged by PEFT against attached")
    except Exception:  # a weight that another module reads around PEFT's, or that PEFT does not merge
        return "merged"
    return ""


def slowly(it: Specimen, model: nn.Module) -> list[torch.Tensor]:
    """A call without the fused layers of torch, which read the weights around PEFT's modules."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return it.outputs(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def ends_of(it: Specimen) -> list[str]:
    """The paths of the model's embedding and head, those that it has."""
    if not hasattr(it.base, "get_input_embeddings"):
        raise Unavailable("no embedding")
    found = []
    for get in (it.base.get_input_embeddings, it.base.get_output_embeddings):
        try:
            end = get()
        except (NotImplementedError, AttributeError):
            continue
        paths = [path for path, module in it.base.named_modules() if module is end]
        usable = paths and hasattr(end, "weight") and end.weight is not None and f"{paths[0]}.weight" in it.used
        if usable and isinstance(end, nn.Embedding | nn.Linear | Conv1D):
            found.append(paths[0])
    if not found:
        raise Unavailable("no embedding")
    return found


def squares(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.detach().double() - two.detach().double()).square().sum())


def sites_of(group: Any) -> list[Any]:
    return [placement.site for placement in group.placements]


def named(model: nn.Module, path: str) -> str:
    """The parameter that a path of the library means."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return next(name for name in (f"{path}.weight", path) if name in names)


def owner(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def names_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[str]]]:
    """Every parameter by its first name, with all names of it."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), (p, []))[1].append(name)
    return {names[0]: (p, names) for p, names in found.values()}
