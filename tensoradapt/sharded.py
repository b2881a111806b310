"""Shards: tensors of which every process holds a part (FSDP, tensor parallelism), or none but while they are used.

Invariant: whole values are read and written by all processes together, and a file is written by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensoradapt.errors import AdapterError


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: this process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def is_here(tensor: Tensor) -> bool:
    """Whether this process surely holds all of a tensor: asked of its type, which costs least."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.numel() > 0


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory; all of a tensor that is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor, name: str = "a factor") -> Tensor:
    """All of a tensor: where it is sharded, every process calls this together.

    Raises AdapterError where DeepSpeed keeps the values elsewhere.
    """
    if is_absent(tensor):
        raise AdapterError(
            f"{name} has no values here",
            got="a parameter that DeepSpeed's ZeRO-3 keeps in pieces between its uses",
            hint="gather the parameters first: with deepspeed.zero.GatheredParameters([*model.parameters()]): ...",
        )
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_absent(tensor: Tensor | None) -> bool:
    """Whether a parameter is one of ZeRO-3's, and not gathered now."""
    return hasattr(tensor, "ds_id") and not tensor.numel()  # type: ignore[union-attr]


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of one that is sharded alike."""
    if not is_sharded(like):
        return whole
    spread: Any = torch.distributed.tensor.distribute_tensor  # type: ignore[attr-defined]  # loaded with the DTensor
    return spread(whole.to(local(like).device), like.device_mesh, like.placements).to_local()  # type: ignore[attr-defined]


def put(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole value into a tensor, or each process its part. Raises AdapterError on a slice of a sharded bank."""
    if is_sharded(tensor) and not isinstance(tensor, nn.Parameter):
        raise AdapterError("a slice of a sharded bank cannot be set", hint="set it before the model is sharded")
    local(tensor).copy_(part_of(whole.to(tensor.dtype), tensor))


def shard_again(model: nn.Module) -> None:
    """Have FSDP drop the whole tensors that it kept after a pass, so that what is written is not written to these."""
    for module in model.modules():
        if _by_fsdp(module):
            module.reshard()  # type: ignore[operator]


def _by_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def sharded_by(model: nn.Module) -> str:
    """What keeps parameters on several processes, and knows those that it found; empty where nothing does."""
    modules = list(model.modules())
    replicas = [module for module in modules if isinstance(module, DistributedDataParallel)]
    if any(dist.get_world_size(module.process_group) > 1 for module in replicas):
        return "DistributedDataParallel"
    flattened = any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())
    if flattened or any("_fsdp_wrapped_module" in module._modules for module in modules):
        return "FullyShardedDataParallel"
    return "fully_shard" if any(map(_by_fsdp, modules)) else ""


def check_site(path: str, owner: nn.Module, name: str) -> None:
    """Raise AdapterError where a weight is a part of one: its module takes or gives a part of what a delta is of."""
    held = owner._parameters.get(name)
    if is_sharded(held):
        raise AdapterError(
            f"the weight of {path} is sharded, by tensor parallelism or by FSDP: this process holds a part of it",
            got=f"{type(held).__name__}, in a {type(owner).__name__}",
            hint="exclude it; or attach before fully_shard, or to the model without tensor parallelism",
        )


def check_whole(model: nn.Module, tensors: Iterable[Tensor], name: str) -> None:
    """Raise AdapterError where factors are sharded: others could not take their places."""
    shard_again(model)
    if any(map(is_sharded, tensors)):
        raise AdapterError(
            f"the factors of adapter {name!r} are sharded: they cannot be changed to others",
            hint="change it before the model is sharded; or save it, change the file, and load that before sharding",
        )


def written_once(tensors: Iterable[Tensor], write: Callable[[], Any]) -> Any:
    """What `write` returns, which writes a file of an adapter: where its tensors are sharded, one process runs it.

    All of them call this together, have what it returned, and raise where it fails.
    """
    sharded: Any = next(filter(is_sharded, tensors), None)
    if sharded is None:
        return write()
    mesh = sharded.device_mesh
    outcome: list[Any] = [None, None]
    if not any(mesh.get_coordinate()):
        outcome = _tried(write)
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group)
    made, error = outcome
    if error is not None:
        raise error
    return made


def _tried(write: Callable[[], Any]) -> list[Any]:
    try:
        return [write(), None]
    except Exception as error:
        return [None, error]
