"""Whole models, with embeddings and a head: numbers against numpy, memory and order, and interruptions."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.analysis import run, spectra
from tensoradapt.io.pairs import open_deltas
from tensoradapt.linalg import Dense, Strips, lapack, mapped

VOCABULARY, WIDTH, LAYERS = 900, 48, 3


def whole_model(dtype=torch.float32, rows=VOCABULARY, width=WIDTH, seed=0):
    """A base and a tuned side: layers between an embedding and a head, every delta of rank 4 with noise."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (rows, width), "lm_head": (rows, width)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj": (width, width) for name in "qv"}
        shapes |= {f"model.layers.{layer}.mlp.up_proj": (2 * width, width)}
    base, tuned = {}, {}
    for name, (m, n) in shapes.items():
        uneven = np.where(np.arange(m) % 37 == 0, 6.0, 1.0)[:, None]
        weight = torch.from_numpy(0.02 * uneven * draw.standard_normal((m, n))).to(dtype)
        low = draw.standard_normal((m, 4)) @ draw.standard_normal((4, n)) * 1e-3
        change = torch.from_numpy(low + 1e-5 * draw.standard_normal((m, n)))
        base[f"{name}.weight"], tuned[f"{name}.weight"] = weight, (weight.double() + change).to(dtype)
    return base, tuned


def spectrum(base: torch.Tensor, tuned: torch.Tensor) -> np.ndarray:
    """By numpy, of the delta in float64."""
    return np.linalg.svd((tuned.double() - base.double()).numpy(), compute_uv=False)


@pytest.mark.parametrize("large", [1 << 26, 1], ids=["formed", "in strips"])
@pytest.mark.parametrize("whole", [1024, 16], ids=["all values", "leading values"])
def test_every_weights_numbers_are_those_of_numpy(monkeypatch, large, whole):
    monkeypatch.setattr(run, "LARGE", large)
    monkeypatch.setattr(run, "BLOCK", 5000)  # about a hundred rows of the embedding at a time
    monkeypatch.setattr(spectra, "WHOLE", whole)
    monkeypatch.setattr(spectra, "VALUES", 6)
    base, tuned = whole_model()
    report = ta.analyze(base, tuned, candidates=False)
    for path, row in report.sites.items():
        s = spectrum(base[f"{path}.weight"], tuned[f"{path}.weight"])
        assert row.norm == pytest.approx(np.linalg.norm(s), rel=1e-5)
        assert row.singular_values[:4] == pytest.approx(s[:4].tolist(), rel=1e-4)
        assert row.ranks["energy_0.99"] == next(r for r in range(5) if (s[:r] ** 2).sum() >= 0.99 * (s**2).sum())
        norm = torch.linalg.vector_norm(base[f"{path}.weight"])
        assert row.relative_change == pytest.approx(float(np.linalg.norm(s) / norm), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ranks_above_uneven_rounding_noise_are_the_same_in_strips(monkeypatch, dtype):
    base, tuned = whole_model(dtype)
    formed = ta.analyze(base, tuned, candidates=False)
    monkeypatch.setattr(run, "LARGE", 1)
    monkeypatch.setattr(run, "BLOCK", 5000)
    strips = ta.analyze(base, tuned, candidates=False)
    for path, row in formed.sites.items():
        assert row.noise["scaled"] and row.ranks == strips.sites[path].ranks
        assert (
            0 < row.ranks["noise"] < (8 if dtype == torch.bfloat16 else 49)
        )  # half precision shows the change's noise
        assert strips.sites[path].noise["edge"] == pytest.approx(row.noise["edge"], rel=1e-6)


def test_embeddings_and_heads_come_last_and_stand_alone():
    report = ta.analyze(*whole_model())
    assert list(report.sites)[-2:] == ["model.embed_tokens", "lm_head"]
    alone = [group for group in report.groups.values() if len(group.sites) == 1]
    assert [group.sites for group in alone] == [("model.embed_tokens",), ("lm_head",)]
    for group in alone:  # one spectrum, that of the weight, and nothing over layers
        row = report.sites[group.sites[0]]
        assert group.mode_spectra["out"] == group.mode_spectra["in"] == list(row.singular_values)
        assert not group.similarity and group.shared_energy["shared"] == group.shared_energy["private"]


LIMITED = """
import resource, torch
import tensoradapt as ta
from tensoradapt.analysis import run, source
name = "model.embed_tokens.weight"
base = {name: torch.randn(60_000, 32)}
tuned = {name: base[name] + 1e-3 * torch.randn(60_000, 2) @ torch.randn(2, 32)}
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken * 1024 + (2 << 30),) * 2)
print(ta.analyze(base, tuned).sites["model.embed_tokens"].ranks["energy_0.99"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_nothing_is_as_large_as_the_square_of_a_vocabulary():
    """A matrix of rows x rows would take 14 GB, in a process that may have two more than it had."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize("shape", [(70, 400), (400, 70)], ids=str)
def test_strips_multiply_as_the_matrix(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    parts = tuple(slice(k, min(k + 90, 400)) for k in range(0, 400, 90))
    found = Strips(shape, parts, lambda at: matrix[at] if shape[0] > shape[1] else matrix[:, at], matrix)
    x, y = torch.randn(shape[1], 3), torch.randn(shape[0], 3)
    rows, cols = torch.rand(shape[0]), torch.rand(shape[1])
    for one, two in ((found, Dense(matrix)), (found.scaled(rows, cols), Dense(rows[:, None] * matrix * cols))):
        torch.testing.assert_close(one.right(x), two.matrix @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.left(y), two.matrix.mT @ y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.dense(), two.matrix)
        assert one.square == pytest.approx(float(two.matrix.double().square().sum()), rel=1e-6)
        small = two.matrix.double() if shape[0] < shape[1] else two.matrix.double().mT
        torch.testing.assert_close(one.gram(), small @ small.mT)


@pytest.mark.parametrize("rows", ["pad", "truncate"])
@pytest.mark.parametrize("layer", ["embed_tokens", "head"])
def test_a_strip_is_a_part_of_the_delta(rows, layer):
    """Also where one side has rows that the other lacks."""
    base, tuned = torch.randn(50, 6), torch.randn(57, 6)
    for pair in ((base, tuned), (tuned, base)):
        deltas = open_deltas(*({f"{layer}.weight": side} for side in pair), rows=rows)
        (site,) = deltas.sites
        whole = deltas.delta(site.path)
        for at in (slice(0, 20), slice(20, 48), slice(45, max(site.shape)), slice(52, 57)):
            part = whole[at] if site.shape[0] > site.shape[1] else whole[:, at]
            torch.testing.assert_close(deltas.strip(site.path, at), part, rtol=0, atol=0)


# -- interruptions --------------------------------------------------------------------------------------------------


def test_a_long_decomposition_can_be_interrupted(monkeypatch):
    """The main thread waits beside the call, so that a signal is seen while LAPACK computes."""

    def slow(_):  # as LAPACK does, it lets no signal through to its thread
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(3)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    monkeypatch.setattr(torch.linalg, "eigvalsh", slow)
    begun = time.monotonic()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            lapack.eigvalsh(torch.zeros(lapack.LONG, lapack.LONG))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - begun < 2


def test_errors_of_a_long_decomposition_are_raised_here():
    bad = torch.full((lapack.LONG, lapack.LONG), float("nan"))
    with pytest.raises(RuntimeError):
        lapack.svd(bad)


def test_values_come_in_order_whoever_computes_them():
    assert list(mapped(lambda k: k * k, range(20))) == [k * k for k in range(20)]


STUCK = """
import signal, sys, threading, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it
from tensoradapt.__main__ import main
from tensoradapt.cli.run import presets

def stuck(*_, **__):
    matrix = torch.randn(7000, 7000)
    print("begun", flush=True)
    {body}

presets.run = stuck
sys.argv = ["tensoradapt", "presets"]
main()
"""
BODIES = {
    "a call that sees no signal": "torch.linalg.svd(matrix)",
    "threads that are joined": "t = threading.Thread(target=time.sleep, args=(30,)); t.start(); t.join()",
    "plain Python": "\n    while True: time.sleep(0.01)",
}


@pytest.mark.parametrize("name", BODIES)
def test_ctrl_c_ends_a_command_at_once(name, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(body=BODIES[name])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert time.monotonic() - begun < 3  # half a second of grace, on a machine that may be busy


BEGUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tensoradapt.__main__ import main
print("begun", flush=True)
main()
"""
COMMANDS = {
    "analyze": "base tuned --out report",
    "extract": "base tuned --preset lora --rank 2 --out new",
    "convert": "adapter --preset lotr --rank 2 --out new",
    "verify": "adapter base tuned",
    "merge": "base adapter --out merged",
    "export": "layers --to peft --out served",  # embeddings without a model are refused at once
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two folders of whole models, an adapter between them, and one of their layers alone."""
    folder = tmp_path_factory.mktemp("interrupted")
    base, tuned = whole_model(rows=4000, width=128)
    for name, side in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(side, folder / name / "model.safetensors")
    for name, targets in (("adapter", {}), ("layers", {"targets": ["q_proj", "v_proj", "up_proj"]})):
        spec = ta.preset("lora", rank=4, **targets)
        ta.extract(str(folder / "base"), str(folder / "tuned"), spec, folder / name)
    return folder


@pytest.mark.parametrize("after", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_leaves_nothing_half_written(command, after, checkpoints):
    before = set(checkpoints.rglob("*"))
    process = subprocess.Popen(
        [sys.executable, "-c", BEGUN, command, *COMMANDS[command].split()],
        cwd=checkpoints,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    took, new = time.monotonic() - begun, set(checkpoints.rglob("*")) - before
    for file in (path for path in new if path.name == "adapter.safetensors"):
        ta.open_adapter(file)  # whole, where the interruption came after it
    for path in sorted(new, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if process.returncode == 0:  # done before it was interrupted
        return
    assert process.returncode == 130 and "Traceback" not in said and said.endswith("interrupted\n")
    assert took < 3 and not [path for path in new if ".partial" not in str(path) and path.name.startswith(".")]


EARLY = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)

class Stop:
    asked = sys.argv[-1]

    def find_spec(self, name, *_):
        if name == self.asked and name not in done:
            done.append(name)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise ImportError("cannot load module more than once per process") from None

done = []
sys.meta_path.insert(0, Stop())
from tensoradapt.__main__ import main
sys.argv = ["tensoradapt", "verify", "a", "b", "c"]
main()
"""


@pytest.mark.parametrize("module", ["typer", "safetensors"])
def test_an_interruption_of_the_imports_is_one_of_the_command(module):
    """Those of the command line, and those of its work: an import that is cut off may raise an error of its own."""
    done = subprocess.run([sys.executable, "-c", EARLY, module], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
