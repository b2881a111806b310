"""Mutated plans: adapter files of every format, what becomes of them, and what they do to whoever opens them.

`python tests/fuzz/plans.py 50000` mutates as many plans, from a seed, and prints what escaped. An escape is an error of
another kind than the package's own where a file is read; an error of any kind where a plan that was read is printed, or
a delta formed of it; and work beyond two seconds of the processor or 300 MB.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.cli.run.info import run as info
from tensoradapt.errors import TensorAdaptError
from tensoradapt.folders import merge_folder
from tensoradapt.io import native
from tensoradapt.plan import Plan

SECONDS, MEGABYTES = 2.0, 300
SMALL = 200_000  # entries up to which tensors are made anew for the shapes of a mutated plan
QV = ["query", "value"]
Json = Any


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(6, 4, 2)).eval()


def _preset(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: ta.preset(name, **{"targets": QV, "rank": 2, **more})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tiny.bert_classifier(layers=2),
    "gpt2": lambda: tiny.gpt2(layers=2),
    "llama": lambda: tiny.llama(layers=2),
    "mixtral": tiny.mixtral,
    "convolutions": convolutions,
}
_LINEARS = [*QV, "intermediate.dense"]
SPECS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("bert", _preset("lora", dropout=0.1)),
    "lotr": ("bert", _preset("lotr")),
    "lotr by role": ("bert", _preset("lotr_by_role", dtype="bfloat16")),
    "tt_lora": ("bert", _preset("tt_lora", folds={"in": [4, 4], "out": [4, 4]})),
    "lorta": ("llama", _preset("lorta", targets=["q_proj", "o_proj"])),
    "loha": ("bert", _preset("loha")),
    "ttm": (
        "bert",
        lambda: ta.Rule(
            targets=QV, format="ttm", rank=2, start="nonzero", folds=dict.fromkeys(("out", "in"), "auto:2")
        ),
    ),
    "tucker": ("bert", _preset("tenslora_qkv_depth", form="tucker")),
    "lokr": ("bert", _preset("lokr", rank=1)),
    "vera": ("bert", _preset("vera", targets=_LINEARS)),
    "slots": ("bert", _preset("fact_tt", targets=_LINEARS)),
    "quanta": ("bert", lambda: ta.preset("quanta", folds="auto:2", targets=QV)),
    "dota": ("bert", _preset("dota", folds="auto:2")),
    "lora_xs": ("bert", _preset("lora_xs")),
    "loretta": ("bert", _preset("loretta", rank=4, tt_rank=2, folds="auto:2")),
    "mpo": ("bert", _preset("mpo_shared", folds="auto:3")),
    "krona": ("bert", lambda: ta.preset("krona", targets=QV)),
    "polar": ("bert", _preset("polar")),
    "cara": ("bert", _preset("cara")),
    "heads": ("llama", _preset("tenslora_att_depth", targets=["q_proj"])),
    "metatt": ("bert", _preset("metatt_5d")),
    "rows": ("gpt2", _preset("lora", targets=["c_attn[v]", "c_attn[q]"], parts={"c_attn": ["q", "k", "v"]})),
    "experts": ("mixtral", _preset("lotr", targets=["gate_up_proj", "down_proj"])),
    "experts apart": ("mixtral", _preset("lora", targets=["gate_up_proj", "down_proj"], delivery="weight")),
    "tie": ("gpt2", _preset("lora", targets=["wte", "lm_head"])),
    "embedding": ("bert", _preset("lora", targets=["word_embeddings"])),
    "convolutions": (
        "convolutions",
        lambda: ta.preset("locon", rank=2, targets=["0"]) + ta.preset("lora", rank=1, targets=["1", "2"]),
    ),
    "extras": ("bert", _preset("lora", train=["classifier", "pooler"])),
    "two rules": (
        "bert",
        lambda: (
            ta.preset("lotr", rank=2, targets=QV)
            + ta.preset("lora", rank={"out": 1}, scale=0.5, targets=["output.dense"])
        ),
    ),
    "network": (
        "bert",
        lambda: ta.Rule(
            targets=QV,
            format="network",
            network="A: out r, r layer s, s in -> layer out in",
            rank={"r": 2, "s": 3},
            start="nonzero",
        ),
    ),
}


@dataclass(frozen=True)
class Seed:
    """One adapter file, the model that it is for, and that model's folder."""

    name: str
    file: Path
    model: Callable[[], nn.Module]
    base: Path
    raw: bytes = field(repr=False)

    @property
    def plan(self) -> Json:
        """The plan in the header."""
        return json.loads(header(self.raw)["__metadata__"]["tensoradapt"])


def seeds(folder: Path, names: Iterator[str] | tuple[str, ...] = ()) -> list[Seed]:
    """An adapter file of every format, written into a folder."""
    made, kept = [], {}
    for name in names or (*SPECS, "extracted", "truncated", "imported"):
        kind, build = SPECS.get(name, ("bert", _preset("lora")))
        model = MODELS[kind]()
        base = folder / kind
        if not base.exists():
            base.mkdir(parents=True)
            model.save_pretrained(base) if hasattr(model, "save_pretrained") else save_file(
                model.state_dict(), base / "model.safetensors"
            )
        adapter = ta.attach(model, build())
        tiny.shake(adapter)
        file = _written(name, adapter, base, folder)
        made.append(
            Seed(name, file, kept.setdefault(kind, partial(copy.deepcopy, MODELS[kind]())), base, file.read_bytes())
        )
    return made


def _written(name: str, adapter: Any, base: Path, folder: Path) -> Path:
    """An adapter as it is; or as an edit, an import and an extraction leave one."""
    out = folder / name.replace(" ", "_")
    if name == "truncated":
        ta.truncate(adapter, rank=1)
    if name == "imported":
        ta.export_peft(adapter, folder / "peft")
        return ta.import_peft(folder / "peft", out=out).path
    if name == "extracted":
        tuned = folder / "tuned"
        adapter.merge_and_detach().save_pretrained(tuned)
        return ta.extract(base, tuned, ta.preset("lotr", rank=2, targets=QV), out).path
    return adapter.save(out)


# -- files ------------------------------------------------------------------------------------------------------------


def header(raw: bytes) -> Json:
    """The header of a safetensors file."""
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def with_plan(raw: bytes, text: str) -> bytes:
    """The file with another text for its plan, whose checksum is right."""
    size = struct.unpack("<Q", raw[:8])[0]
    found = json.loads(raw[8 : 8 + size])
    metadata = found["__metadata__"]
    sums = json.loads(metadata["crc32"]) | {"tensoradapt": zlib.crc32(text.encode("utf-8", "surrogatepass"))}
    metadata |= {"tensoradapt": text, "crc32": json.dumps(sums)}
    made = json.dumps(found).encode()
    made += b" " * (-len(made) % 8)
    return struct.pack("<Q", len(made)) + made + raw[8 + size :]


def refitted(file: Path, text: str, names: dict[str, str]) -> bool:
    """Write tensors of the shapes that a mutated plan asks for; False where there is no such plan, or it is large."""
    try:
        wanted = native.expected(Plan.from_dict(json.loads(text)))
        if not 0 < sum(float(np.prod([min(n, 10**6) for n in shape])) for shape in wanted.values()) < SMALL:
            return False
        save_file({k: tiny.noise(*shape) for k, shape in wanted.items()}, file, metadata={**names, "tensoradapt": text})
    except Exception:
        return False
    return True


# -- mutations --------------------------------------------------------------------------------------------------------

STRINGS = ("", "x", "forward", "__class__", "a.b", "../x", "out", "in", "layer", "site", "slot", "linear", "conv")
STRINGS += ("embedding", "parameter", "weight", "output", "in out", "out in", "as stored", "either", "zero", "nonzero")
STRINGS += ("difference", "tt", "cp", "ttm", "tucker", "network", "slots", "slices", "separate", "\ud800", "\x1b[2J")
STRINGS += ("re:(a+)+$", "re:(.*)*x", "re:(", "[", "auto:9", "auto:0", "factor:0", "head", "out a, a in -> out in")
STRINGS += ("uniform(10**10**10)", "normal(1/0)", "eye", "a" * 5000, "é", "-> ->", "core_out", "q[0]", ":", "a=3")
NUMBERS = (0, 1, 2, 3, -1, 7, 10**4, 10**6, 10**9, 2**31, 2**63, 10**18, 10**40, 0.5, -2.5, 1e308, 1e38, 1e-320)
NUMBERS += (float("nan"), float("inf"), float("-inf"), True, False)
OTHERS = (None, [], {}, [[]], {"a": 1}, [1], ["a"], [None], [1, 2, 3, 4])


def paths(data: Json, at: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from paths(value, (*at, key))


def _at(data: Json, path: tuple) -> Json:
    for key in path:
        data = data[key]
    return data


def _numbers(value: Json, rng: random.Random) -> tuple:
    changed = (value + 1, value - 1, -value, value * 2, value // 2, value * 10**6, float(value), str(value))
    return (*changed, *NUMBERS)


def _words(value: Json, rng: random.Random) -> tuple:
    return (
        value + "x",
        value[1:],
        value.upper(),
        value * 2,
        value.replace(".", "/"),
        value.replace("0", "1"),
        *STRINGS,
    )


def _lists(value: Json, rng: random.Random) -> tuple:
    return (value * 2, value[::-1], value[:1], value[1:], [*value, *value[:1]], [value], {"0": value}, [])


def _mappings(value: Json, rng: random.Random) -> tuple:
    keys = list(value)
    rng.shuffle(keys)
    shuffled = {key: value[key] for key in keys}
    return (shuffled, dict(zip(value, shuffled.values(), strict=True)), {}, list(value.values()))


KINDS: dict[type, Callable[[Json, random.Random], tuple]] = {
    bool: lambda value, rng: (not value,),
    **{int: _numbers, float: _numbers, str: _words, list: _lists, dict: _mappings},
}


def _another(value: Json, data: Json, rng: random.Random) -> Json:
    """Another value in a value's place: of its kind more often than not."""
    kind, choices = rng.random(), KINDS.get(type(value))
    if kind < 0.15:
        return copy.deepcopy(_at(data, rng.choice(list(paths(data)))))
    if kind < 0.3 or choices is None:
        return copy.deepcopy(rng.choice((*STRINGS, *NUMBERS, *OTHERS)))
    return copy.deepcopy(rng.choice(choices(value, rng)))


def _path(data: Json, rng: random.Random) -> tuple:
    """A path, those near the root as likely as the many below."""
    at: tuple = ()
    while True:
        value = _at(data, at)
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if not keys or (at and rng.random() < 0.12):
            return at
        counts = not at and rng.random() < 0.8  # most values at the root are counts
        at = (*at, rng.choice([key for key in keys if not counts or isinstance(value[key], dict | list)]))


def _delete(owner: Json, key: Json, data: Json, rng: random.Random) -> None:
    del owner[key]


def _double(owner: Json, key: Json, data: Json, rng: random.Random) -> None:
    if type(owner) is list:
        owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(owner[key]))
    else:
        owner[f"{key}_2"] = copy.deepcopy(owner[key])


def _rename(owner: Json, key: Json, data: Json, rng: random.Random) -> None:
    if type(owner) is dict:
        owner[rng.choice((*STRINGS, *owner))] = owner.pop(key)


def _swap(owner: Json, key: Json, data: Json, rng: random.Random) -> None:
    other = rng.choice(list(owner) if type(owner) is dict else range(len(owner)))
    owner[key], owner[other] = owner[other], owner[key]


def _move(owner: Json, key: Json, data: Json, rng: random.Random) -> None:
    """Everywhere alike: one value for another, and one name for another."""
    old, new = owner[key], _another(owner[key], data, rng)
    for at in list(paths(data)):
        with suppress(KeyError, IndexError, TypeError):
            if _at(data, at) == old:
                _at(data, at[:-1])[at[-1]] = copy.deepcopy(new)


def _replace(owner: Json, key: Json, data: Json, rng: random.Random) -> None:
    owner[key] = _another(owner[key], data, rng)


HOW = {"change": _replace, "delete": _delete, "double": _double, "move": _move, "rename": _rename, "swap": _swap}


def _changed(data: Json, rng: random.Random) -> str:
    """Change one thing in place, and say what."""
    path = _path(data, rng)
    what = rng.choice(("change",) * 6 + tuple(HOW))
    if path:
        HOW[what](_at(data, path[:-1]), path[-1], data, rng)
    return f"{what} {'.'.join(map(str, path))}"


def mutated(plan: Json, rng: random.Random) -> tuple[str, str]:
    """A plan's text with up to three changes, and what they are; now and then with a key that is there twice."""
    data = copy.deepcopy(plan)
    said = [_changed(data, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    text = json.dumps(data)
    if rng.random() < 0.03:
        name = rng.choice(('"name": ', '"rule": ', '"scale": ', '"sites": ', '"path": ', '"r": ', '"model": '))
        text = text.replace(name, f"{name}{rng.choice(['1', '[]', 'null', chr(34) * 2])}, {name}", 1)
        said.append(f"twice {name}")
    if rng.random() < 0.005:
        text = "[" * 100_000
        said.append("deep")
    return text, "; ".join(said)


# -- judging ----------------------------------------------------------------------------------------------------------


class Beyond(BaseException):
    """More work than is allowed. No Exception, so that nothing takes it for an error of its own."""


@contextmanager
def limits() -> Iterator[None]:
    """Raise Beyond after two seconds of the processor, and on growth of more than 300 MB."""

    def late(*_: Any) -> None:
        raise Beyond(f"more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEGABYTES:
        raise Beyond(f"{grown:.0f} MB")


@dataclass
class Judge:
    """What became of mutated files: how many were refused, worked, or escaped, and the escapes by where they were."""

    folder: Path
    counts: Counter = field(default_factory=Counter)
    escapes: dict[str, list[str]] = field(default_factory=dict)

    def judge(self, seed: Seed, file: Path, what: str, rng: random.Random) -> None:
        """Open a file, and use what opens."""
        opened = self._try("read", what, lambda: ta.open_adapter(file), lenient=True)
        if opened is None:
            self.counts["refused"] += 1
            return
        self.counts["accepted"] += 1
        for name, use, lenient in self._uses(seed, opened, file, rng):
            self._try(name, what, use, lenient=lenient)

    def _uses(self, seed: Seed, saved: Any, file: Path, rng: random.Random) -> Iterator[tuple[str, Callable, bool]]:
        yield "str", lambda: [str(saved), str(saved.plan), saved.plan.text(wide=True), saved.plan.to_csv()], False
        yield "to_dict", lambda: Plan.from_dict(json.loads(json.dumps(saved.plan.to_dict()))), False
        yield "delta", lambda: [_finite(saved.delta(path)) for path in saved.sites], False
        yield "factors", lambda: [(saved.factors(group), saved.starts(group)) for group in saved.groups], False
        yield "info", lambda: _printed(file), False
        yield "save", lambda: saved.save(self.folder / "again.safetensors"), True
        yield "load and merge", lambda: _merged(seed, file), True
        rest = {
            "merge_folder": lambda: merge_folder(seed.base, file, self._out()),
            "export_peft": lambda: ta.export_peft(file, self._out()),
            "convert": lambda: ta.convert(file, ta.preset("lora", rank=2)),
            "edits": lambda: _edited(seed, file),
            "to_tensorly": lambda: _tensorly(seed, file),
            "verify": lambda: ta.verify(file, seed.base, seed.base),
        }
        name = rng.choice(list(rest))
        yield name, rest[name], True

    def _out(self) -> Path:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def _try(self, name: str, what: str, call: Callable[[], Any], *, lenient: bool) -> Any:
        try:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call()
        except TensorAdaptError as error:
            if lenient:
                self.counts[f"{name} refused"] += 1
            else:
                self._escape(name, what, error)
        except (Exception, Beyond) as error:
            self._escape(name, what, error)
        return None

    def _escape(self, name: str, what: str, error: BaseException) -> None:
        self.counts[f"{name} escaped"] += 1
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "tensoradapt/" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        kept = self.escapes.setdefault(f"{name}: {type(error).__name__} at {where}: {str(error)[:90]!r}", [])
        kept.append(what)


def _finite(delta: torch.Tensor) -> None:
    if not bool(delta.isfinite().all()):
        raise ValueError("a delta is not finite")


def _printed(file: Path) -> None:
    with redirect_stdout(StringIO()) as out:
        info(str(file), wide=True, as_json=False)
        info(str(file), wide=False, as_json=True)
    out.getvalue().encode()


def _merged(seed: Seed, file: Path) -> None:
    model = seed.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = ta.load(file, model)
    str(adapter)
    adapter.merge(untie=True)
    adapter.unmerge()
    adapter.detach()
    after = model.state_dict()
    if list(before) != list(after) or not all(torch.equal(before[name], after[name]) for name in before):
        raise ValueError("the model is not as it was")


def _edited(seed: Seed, file: Path) -> None:
    model = seed.model()
    adapter = ta.load(file, model)
    for edit in (ta.orthogonalize, lambda a: ta.truncate(a, error=0.1), lambda a: ta.resize(a, rank=2)):
        edit(adapter)


def _tensorly(seed: Seed, file: Path) -> None:
    ta.load(file, seed.model()).to_tensorly()


def run(count: int, seed: int, folder: Path, names: tuple[str, ...] = ()) -> Judge:
    """Mutate so many plans, one kind of file after the other."""
    rng, judge = random.Random(seed), Judge(folder)
    found = seeds(folder, names)
    file = folder / "mutated.safetensors"
    for k in range(count):
        one = found[k % len(found)]
        text, what = mutated(one.plan, rng)
        names_of = {
            key: value for key, value in header(one.raw)["__metadata__"].items() if key in ("version", "format")
        }
        if not (rng.random() < 0.5 and refitted(file, text, names_of)):
            file.write_bytes(with_plan(one.raw, text))
        judge.judge(one, file, f"{one.name}: {what}", rng)
    return judge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        judge = run(given.count, given.seed, Path(folder), tuple(given.only))
    for name, count in sorted(judge.counts.items()):
        print(f"{count:7d} {name}")
    for where, whats in sorted(judge.escapes.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(whats):6d} {where}\n         {whats[0][:150]}")
    return 1 if judge.escapes else 0


if __name__ == "__main__":
    sys.exit(main())
