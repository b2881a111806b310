"""What the servers refuse or misread of an exported folder, said before it is written.

Invariant: a server that is named gets a folder that it serves as it is meant, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tensoradapt.errors import AdapterError, SpecError
from tensoradapt.peft.keys import HEADS
from tensoradapt.peft.modules import Module
from tensoradapt.sites import SiteMap

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_VLLM_HEADS = ("classifier", "score")


STACKING = ("sglang", "tgi", "lorax")  # servers that want all of a stack, or a role in all layers
# Of vLLM's classes, those that serve a LoRA on the embedding or the head: they have `embedding_modules`.
_VLLM_TABLES = ("Llama", "Mistral", "Mixtral", "Granite", "GraniteMoe", "Exaone", "Nemotron", "Jamba", "Phi3")


@dataclass(frozen=True)
class Tables:
    """The embeddings and heads among the modules, those of them that are tied, and the model's class, where known."""

    paths: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    kind: str = ""


def tables_of(modules: Iterable[Module], known: SiteMap | None, kind: str) -> Tables:
    """The modules that hold a vocabulary: embeddings, and heads by their names; ties are the model's."""
    paths = tuple(m.path for m in modules if m.kind == "embedding" or m.path.rpartition(".")[2] in HEADS)
    tied = {site.owner for site in known.sites if site.aliases} if known else set()
    return Tables(paths, tuple(path for path in paths if path in tied), kind)


@dataclass(frozen=True)
class Folder:
    """What a folder is to hold: its modules, the rank that it states, its patterns, and modules trained whole."""

    modules: Sequence[Module]
    rank: int
    patterns: Mapping[str, int]
    saved: Sequence[str]
    base: str | None
    tables: Tables


def check(consumer: str | None, folder: Folder) -> None:
    """Raise AdapterError with everything that a consumer refuses or misreads, SpecError on another consumer."""
    if consumer is None:
        return
    if consumer not in _CONSUMERS:
        raise SpecError(f"consumer={consumer!r} is none that is known", expected=", ".join(_CONSUMERS))
    problems = _CONSUMERS[consumer](folder)
    if problems:
        raise AdapterError(
            f"{consumer} does not serve this adapter as it is meant",
            got="; ".join(problems),
            hint="mend it, or merge the adapter and serve the whole model",
        )


def _vllm(folder: Folder) -> list[str]:
    heads = [name for name in folder.saved if name.rpartition(".")[2] not in _VLLM_HEADS]
    return [
        *_kernels(folder, "vLLM"),
        *([f"rank {folder.rank} is above {VLLM_RANKS[-1]}: rank= truncates"] if folder.rank > VLLM_RANKS[-1] else []),
        *(["older versions drop rank_pattern, and scale wrongly: layout portable"] if folder.patterns else []),
        *([f"modules trained whole are refused: {', '.join(heads)}"] if heads else []),
        *_vllm_tables(folder.tables),
    ]


def _vllm_tables(tables: Tables) -> list[str]:
    served = not tables.kind or tables.kind.removesuffix("ForCausalLM") in _VLLM_TABLES
    says = f"vLLM's {tables.kind} has no LoRA of embeddings and heads: {', '.join(tables.paths)}"
    return [says] if tables.paths and not served else []


def _stacking(folder: Folder) -> list[str]:
    """SGLang, TGI and LoRAX, as their loaders were read: LoRA of linear modules, one scale for all."""
    tables = [module.path for module in folder.modules if module.kind == "embedding"]
    return [
        *_kernels(folder, "the server"),
        *(["ranks by pattern are not read: layout portable"] if folder.patterns else []),
        *([f"modules trained whole are refused: {', '.join(folder.saved)}"] if folder.saved else []),
        *([f"no LoRA of an embedding is read: {', '.join(tables)}"] if tables else []),
    ]


def _llama_cpp(folder: Folder) -> list[str]:
    twins = [
        m.path for m in folder.modules if m.path.rpartition(".")[2] in HEADS and m.parts and m.parts[0].path != m.path
    ]
    tied = dict.fromkeys((*twins, *folder.tables.tied))
    return [
        *_kernels(folder, "llama.cpp"),
        *(
            ["alpha_pattern is ignored, every tensor is scaled by its own rank: layout portable"]
            if folder.patterns
            else []
        ),
        *([f"modules trained whole are refused: {', '.join(folder.saved)}"] if folder.saved else []),
        *([f"{', '.join(tied)}: tied, one tensor for embedding and head, which llama.cpp refuses"] if tied else []),
    ]


def _kernels(folder: Folder, server: str) -> list[str]:
    convolutions = [module.path for module in folder.modules if module.kind == "conv"]
    return [f"{server} has no LoRA of convolutions: {', '.join(convolutions[:4])}"] if convolutions else []


_CONSUMERS: Mapping[str, Callable[[Folder], list[str]]] = {
    **{"vllm": _vllm, "llama.cpp": _llama_cpp},
    **dict.fromkeys(STACKING, _stacking),
}


def advice(folder: Folder) -> tuple[str, ...]:
    """What to tell the servers."""
    fits = next((rank for rank in VLLM_RANKS if rank >= folder.rank), None)
    vllm = f"vLLM: --enable-lora --max-lora-rank {fits}" if fits else f"vLLM serves ranks up to {VLLM_RANKS[-1]}"
    uneven = ("the ranks differ: PEFT and newer versions of vLLM alone read them right",) if folder.patterns else ()
    tables = folder.tables
    tie = (
        ("llama.cpp refuses this where the head is tied to the embedding: model= tells",)
        if tables.paths and not tables.kind
        else ()
    )
    nameless = () if folder.base else ("no base is named: llama.cpp's converter wants --base, and servers its name",)
    return (vllm, *uneven, *tie, *nameless)
