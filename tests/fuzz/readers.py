"""Every reader of files: what it is given when all is right, and what a user then does with what it let through.

What a reader lets through has to work: it is planned, printed, multiplied out and drawn here, and whatever of that is
refused is refused by a `TensorAdaptError`.
"""

from __future__ import annotations

import json
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tiny
import torch
from fuzz.limits import SECONDS, Hang, Watch, watched
from fuzz.mutations import Files
from reports import report
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.extract.journal import Journal
from tensoradapt.io.checkpoint import open_checkpoint
from tensoradapt.plots import draw_figure, drawable, read_report, render_html
from tensoradapt.plots.figures import caption

PACKAGE = Path(ta.__file__).parent
SHAPES = {f"encoder.layer.{k}.self.{role}": (16, 16) for k in range(2) for role in ("query", "key", "value")}
SHAPES |= {"stem.conv": (8, 4, 3, 3), "classifier": (3, 16), "mlp.up": (24, 16)}
LORA = ta.preset("lora", rank=2, targets=["all-linear"])


@dataclass(frozen=True)
class Reader:
    """A reader: files that are right, and what reads them and goes on with them."""

    name: str
    seeds: Callable[[], tuple[Files, ...]]
    read: Callable[[Path], object]
    writes: bool = False  # into the folder


@dataclass(frozen=True)
class Outcome:
    """What became of one input: `accepted`, `refused`, or an escape, which has a place and a description."""

    word: str
    place: str = ""
    said: str = ""

    @property
    def escaped(self) -> bool:
        return self.word == "escape"


@cache
def warmed(name: str) -> Reader:
    """A reader whose own files were read once: what is imported and written to caches at first is no input's doing.

    Raises AssertionError where one is refused.
    """
    reader = READERS[name]
    for files in reader.seeds():
        with tempfile.TemporaryDirectory() as place:
            laid(files, Path(place))
            reader.read(Path(place))
    return reader


def laid(files: Mapping[str, bytes], folder: Path) -> None:
    """Write an input's files into a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def outcome(reader: Reader, files: Mapping[str, bytes], seconds: float = SECONDS) -> Outcome:
    """Try an input in a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        laid(files, folder)
        watch = Watch()
        try:
            with warnings.catch_warnings(), watched(folder, written=reader.writes, seconds=seconds) as watch:
                warnings.simplefilter("ignore")
                reader.read(folder)
            found = Outcome("accepted")
        except ta.TensorAdaptError as error:
            found = _typed(error)
        except (Exception, Hang, SystemExit) as error:
            found = Outcome("escape", f"{type(error).__name__} {_place(error)}", f"{type(error).__name__}: {error}")
        if watch.done:
            return Outcome("escape", watch.done[0].partition(" ")[0], "; ".join(watch.done[:3]))
        return found


def _typed(error: ta.TensorAdaptError) -> Outcome:
    """A refusal, unless it takes a screen to read."""
    text = str(error)
    if len(text) > 20_000:
        return Outcome("escape", f"long {_place(error)}", f"{len(text)} characters: {text[:300]}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Outcome("escape", f"surrogate {_place(error)}", ascii(text)[:300])
    return Outcome("refused")


def _place(error: BaseException) -> str:
    """The last line of the package that an error came through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if Path(file).is_relative_to(PACKAGE):
            found = f"{Path(file).relative_to(PACKAGE)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


# -- specs ------------------------------------------------------------------------------------------------------------

FULL = {
    "defaults": {"scale": "alpha/rank", "alpha": 2.0, "dtype": "float32"},
    "rules": [
        {"preset": "tt_lora", "rank": 3, "targets": ["query"], "options": {}, "folds": {"in": [4, 4], "out": "auto:2"}},
        {
            **{
                "targets": ["re:encoder\\.layer\\.\\d+\\.self\\.value", "*.self.key"],
                "exclude": ["*.0.self.key"],
                "format": "tucker",
            },
            **{
                "axes": ["layer", "role", "out", "in"],
                "rank": {"head": 2, "head_dim": 2, "in": 3, "layer": "layer", "role": 1},
                "start": "zero",
            },
            **{"pattern": "encoder.layer.{layer}.self.{role}", "init": {"core": "zero", "*": "normal(1/sqrt(in))"}},
            **{
                "folds": {"out": ["head", "head_dim"]},
                "heads": 4,
                "dropout": 0.1,
                "zero": "core",
                "scale": 2.0,
                "alpha": 1.0,
            },
        },
        {
            **{"targets": ["up"], "parts": {"up": {"a": 8, "b": 16}}, "format": "network", "delivery": "weight"},
            **{"network": "a: out r, b: r in -> out in", "zero": "a", "rank": 2, "layout": {}, "train": []},
        },
        {"preset": "lokr", "rank": 2, "targets": ["stem.conv"], "options": {"factor": 4}},
    ],
}
SHORT = {"rules": [{"preset": "lora", "rank": 4, "targets": ["query", "value"], "alpha": 8.0}]}
SLICES = {
    "rules": [
        {"preset": "lotr", "rank": [2, 3], "targets": ["query", "up"], "shapes": "slots", "slot": [4, 4], "scale": 0.5}
    ]
}


def _specs(name: str) -> Callable[[], tuple[Files, ...]]:
    return lambda: tuple({name: json.dumps(spec).encode()} for spec in (FULL, SHORT, SLICES))


def _spec(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        spec = ta.Spec.load(folder / name)
        assert ta.Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec, "it does not come back"
        str(spec)
        plan = ta.plan(spec, SHAPES)
        str(plan)
        json.dumps(plan.to_dict())

    return read


# -- weights ----------------------------------------------------------------------------------------------------------


def _stored(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        save_file(dict(tensors), Path(place) / "x", metadata=dict(metadata or {}))
        return (Path(place) / "x").read_bytes()


WEIGHTS = {f"layers.{k}.{role}.weight": (8, 6) for k in range(2) for role in "qv"}
WEIGHTS |= {"mlp.experts.up": (3, 8, 6), "norm.weight": (8,), "stem.weight": (4, 2, 3, 3)}


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tiny.noise(*shape, seed=k + seed) for k, (name, shape) in enumerate(WEIGHTS.items())}


@cache
def _headers() -> tuple[Files, ...]:
    state = _state()
    halves = {name: tensor.bfloat16() for name, tensor in state.items()}
    return ({"model.safetensors": _stored(state)}, {"model.safetensors": _stored(halves, {"format": "pt"})})


@cache
def _indices() -> tuple[Files, ...]:
    state = _state()
    names = list(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    placed = {name: file for file, held in parts.items() for name in held}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode()
    shards = {file: _stored({name: state[name] for name in held}) for file, held in parts.items()}
    return ({"model.safetensors.index.json": index, **shards},)


def _checkpoint(folder: Path) -> None:
    with open_checkpoint(folder) as found:
        for name in found.entries:
            found.read(name)
    str(ta.plan(LORA, folder))


# -- PEFT -------------------------------------------------------------------------------------------------------------

PEFT = {
    **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "bias": "none", "use_rslora": False},
    **{"rank_pattern": {"layers.0.q": 3}, "alpha_pattern": {r"layers\.\d+\.v": 8}, "modules_to_save": ["head"]},
    **{"layers_to_transform": None, "exclude_modules": None, "base_model_name_or_path": "a/b", "fan_in_fan_out": False},
}


def _adapted(**ranks: int) -> dict[str, torch.Tensor]:
    found = {}
    for k, path in enumerate(f"layers.{k}.{role}" for k in (0, 1) for role in "qv"):
        rank = ranks.get(path.replace(".", "_"), 2)
        found[f"base_model.model.{path}.lora_A.weight"] = tiny.noise(rank, 6, seed=k)
        found[f"base_model.model.{path}.lora_B.weight"] = tiny.noise(8, rank, seed=9 + k)
    return found


@cache
def _peft() -> tuple[Files, ...]:
    head = {"base_model.model.head.weight": tiny.noise(3, 8)}
    layers = {**PEFT, "layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": ["q", "v"]}
    shared = {"peft_type": "VERA", "r": 4, "target_modules": "all-linear", "projection_prng_key": 0, "d_initial": 0.1}
    vera = {"base_model.vera_A": tiny.noise(4, 6), "base_model.vera_B": tiny.noise(8, 4)}
    vera |= {f"base_model.model.l.{k}.q.vera_lambda_d": tiny.noise(4) for k in (0, 1)}
    vera |= {f"base_model.model.l.{k}.q.vera_lambda_b": tiny.noise(8) for k in (0, 1)}
    lokr = {"peft_type": "LOKR", "r": 2, "alpha": 4, "target_modules": r".*\.(q|v)"}
    kron = {f"base_model.model.l.{k}.q.lokr_w1": tiny.noise(2, 2) for k in (0, 1)}
    kron |= {f"base_model.model.l.{k}.q.lokr_w2_a": tiny.noise(4, 2) for k in (0, 1)}
    kron |= {f"base_model.model.l.{k}.q.lokr_w2_b": tiny.noise(2, 3) for k in (0, 1)}
    folders = ((PEFT, _adapted(layers_0_q=3) | head), (layers, _adapted(layers_0_q=3)), (shared, vera), (lokr, kron))
    return tuple(
        {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": _stored(held)}
        for config, held in folders
    )


def _used(saved: ta.Saved) -> None:
    """All that a user sees of an adapter without its model."""
    str(saved)
    str(saved.plan)
    json.dumps(saved.plan.to_dict())
    for path in saved.sites:
        saved.delta(path)
    for group in saved.groups:
        saved.factors(group)


def _imported(folder: Path) -> None:
    _used(ta.open_adapter(folder))


# -- adapter files ----------------------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """Two layers of three weights, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({role: torch.nn.Linear(6, 6) for role in ("q", "k", "v")}) for _ in range(2)
        )
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["q"](x) * layer["k"](x) + layer["v"](x)
        return self.head(x)


@cache
def _adapters() -> tuple[Files, ...]:
    specs = (
        ta.preset("lora", rank=2, targets=["q"]) + ta.preset("lotr", rank=2, targets=["v"]),
        ta.preset("tt_lora", rank=2, targets=["re:.*\\.k"], folds={"in": [2, 3], "out": [3, 2]}, train=["head"]),
        ta.preset("vera", rank=4, targets=["q", "v"]),
    )
    found = []
    for spec in specs:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as place:
            adapter = ta.attach(Toy(), spec)
            tiny.shake(adapter)
            adapter.save(Path(place))
            found.append({"adapter.safetensors": (Path(place) / "adapter.safetensors").read_bytes()})
    return tuple(found)


def _adapter(folder: Path) -> None:
    _used(ta.open_adapter(folder))
    model = Toy()
    adapter = ta.load(folder, model)
    adapter.merge()


# -- journals ---------------------------------------------------------------------------------------------------------

EXTRACTED = ta.preset("lora", rank=2, targets=["q"]) + ta.preset("lotr", rank=2, targets=["v"])


def _sides() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base = {name: tensor for name, tensor in _state().items() if name.startswith("layers")}
    return base, {name: tensor + 0.1 * tiny.noise(8, 6, seed=20 + k) for k, (name, tensor) in enumerate(base.items())}


class Stop(Exception):
    """An extraction that is interrupted before its end."""


@cache
def _journals() -> tuple[Files, ...]:
    """The folder beside an output, as it is when a part of it is done."""
    with tempfile.TemporaryDirectory() as place:

        def stop(*_: object) -> None:
            if any(Path(place).rglob("*.safetensors")):
                raise Stop

        try:
            ta.extract(*_sides(), EXTRACTED, Path(place) / "out", progress=stop)
        except Stop:
            pass
        files = sorted(file for file in Path(place).rglob("*") if file.is_file() and file.name != "lock")
        return ({str(file.relative_to(place)): file.read_bytes() for file in files},)


def _journal(folder: Path) -> None:
    for part in folder.rglob("*.safetensors"):
        Journal(part.parent).read("q")
    ta.extract(*_sides(), EXTRACTED, folder / "out", overwrite=True)


# -- reports ----------------------------------------------------------------------------------------------------------


@cache
def _reports() -> tuple[Files, ...]:
    return tuple(
        {"report.json": json.dumps(report({"a.query": (6, 4)}, 2, values=4, kind=kind)).encode()}
        for kind in ("checkpoints", "adapters")
    )


def _report(folder: Path) -> None:
    """One figure of it, and of every eighth the whole page, which takes longest."""
    file = folder / "report.json"
    found = read_report(file)
    turn, names = zlib.crc32(file.read_bytes()), drawable(found)
    for name in names:
        caption(found, name)
    if names:
        draw_figure(found, names[turn // 8 % len(names)], folder / "figure.svg")
    if turn % 8:
        return
    page = render_html(found)
    for harm in ("<script>alert", "<img src=x", "onerror=alert(1)>"):
        assert harm not in page, "a report's words are markup on its page"


# -- configs ----------------------------------------------------------------------------------------------------------

TRAP = "raise SystemExit('code of the folder was run')\n"
BERT = {
    **{
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": 16,
        "num_attention_heads": 4,
        "vocab_size": 40,
    },
    **{"intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32, "hidden_act": "gelu"},
}
LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "num_hidden_layers": 2, "head_dim": 4},
    **{
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "auto_map": {"AutoConfig": "trap.C"},
    },
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}


def _configs() -> tuple[Files, ...]:
    return tuple(
        {"config.json": json.dumps(config).encode(), "trap.py": TRAP.encode()} for config in (BERT, LLAMA, MIXTRAL)
    )


def _config(folder: Path) -> None:
    plan = ta.plan(LORA, folder)
    str(plan)
    json.dumps(plan.to_dict())


READERS = {
    reader.name: reader
    for reader in (
        Reader("spec_yaml", _specs("spec.yaml"), _spec("spec.yaml")),
        Reader("spec_json", _specs("spec.json"), _spec("spec.json")),
        Reader("header", _headers, _checkpoint),
        Reader("index", _indices, _checkpoint),
        Reader("peft", _peft, _imported),
        Reader("adapter", _adapters, _adapter),
        Reader("journal", _journals, _journal, writes=True),
        Reader("report", _reports, _report, writes=True),
        Reader("config", _configs, _config),
    )
}
