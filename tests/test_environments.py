"""Every command where things are otherwise: hostile folders, few letters, no docstrings, no home."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_provenance import tuned_of

import tensoradapt as ta

RUNNER = Path(__file__).with_name("environments.py")
LETTERS = "modèle→ü"
COMMANDS = """
presets
presets lotr
plan --model {b} --preset lotr --rank 2 --out {o}/spec.yaml
budget --model {b} --preset lora --target query --ranks 1:3 --out {o}/budget.pdf
analyze {b} {t} --out {o}/report
extract {b} {t} --preset lora --rank 1 --target query --out {o}/adapter
info {o}/adapter
convert {o}/adapter --preset lotr --rank 2 --out {o}/converted
export {o}/adapter --to peft --model {b} --out {o}/peft
convert {o}/peft --preset lora --rank 1 --out {o}/imported
merge {b} {o}/adapter --out {o}/merged
verify {o}/adapter {b} {t} --tolerance 9
analyze --adapter {o}/adapter --adapter {o}/converted --out {o}/set
plot {o}/report/report.json --out {o}/figures
plan --model {b} --preset lora --rank 2 --target no-such-{l}
"""
AT_FAULT = 2


def words(base, tuned, out):
    rows = COMMANDS.strip().splitlines()
    return [row.format(b=base, t=tuned, o=out, l=LETTERS).split(" ") for row in rows]


def pair(folder):
    """The folders of a base and a tuned model of it."""
    model = tiny.bert_classifier()
    for name, side in (("base", model), ("tuned", tuned_of(model))):
        side.save_pretrained(folder / name)
    (folder / "out").mkdir()
    return folder / "base", folder / "tuned"


def ran(folder, commands, *flags, watched="", doors=(), cwd=None, **environment):
    """Run commands in one process, with `yes` on its standard input; what became of them, and what it printed."""
    told = {"commands": commands, "out": str(folder / "result.json"), "watched": watched, "doors": list(doors)}
    (folder / "told.json").write_text(json.dumps(told), "utf-8")
    path = os.pathsep.join([str(Path(ta.__file__).parents[1]), str(RUNNER.parent)])
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", *environment)}
    given = {key: value for key, value in {"HOME": str(folder), **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *flags, str(RUNNER), str(folder / "told.json")],
        env=kept | {"PYTHONPATH": path} | given,
        input=b"yes\n" * 4096,
        capture_output=True,
        cwd=cwd,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return json.loads((folder / "result.json").read_text()), done.stdout, done.stderr


# -- code in folders ---------------------------------------------------------------------------------------------------


class Evil:
    """What a pickle runs when it is opened."""

    def __reduce__(self):
        return os.mkdir, (os.environ.get("EVIL", "/nonexistent/evil"),)


CLASSES = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
AUTO = {name: f"evil.{name}" for name in CLASSES}
NAMES = ("evil", "__init__", "modeling_bert", "torch", "transformers", "peft", "sitecustomize", "conftest", "setup")


def poisoned(folder, **fields):
    """A folder with code of every kind beside what it holds, and named by its configs."""
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(config | {"auto_map": AUTO} | fields))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Transformer"}]))
    return folder


DOORS = """
import warnings; warnings.simplefilter("ignore")
import tensoradapt as ta
b, t, o = {b!r}, {t!r}, {o!r}
spec = ta.preset("lora", rank=1, targets=["query"])
def door(act, *args, **options):
    try:
        return act(*args, **options)
    except ta.TensorAdaptError:
        return None
door(ta.plan, spec, b); door(ta.budget, spec, b, [1, 2]); door(ta.solve_rank, spec, b, max_parameters=500)
door(ta.analyze, b, t); door(ta.analyze, b, t, model=b); door(ta.extract, b, t, spec, o + "/again")
for a in (o + "/adapter", o + "/again", o + "/peft"):
    door(ta.merge_folder, b, a, o + "/into", model=b, overwrite=True)
    door(ta.verify, a, b, t, model=b); door(ta.convert, a, spec, o + "/other", overwrite=True)
    door(ta.export_peft, a, o + "/exported", model=b, overwrite=True); door(ta.import_peft, a, model=b)
    door(ta.open_adapter, a)
door(ta.Spec.load, o + "/spec.yaml")
"""
MODELS = {"known": {}, "unknown": {"model_type": "evil"}}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_no_command_runs_what_a_folder_holds(fields, tmp_path):
    base, tuned = (poisoned(side, **fields) for side in pair(tmp_path / "models"))
    out = tmp_path / "models" / "out"
    first = [row for row in words(base, tuned, out) if row[0] in ("plan", "extract")]
    ran(tmp_path, first, cwd=base)
    ta.export_peft(out / "adapter", out / "peft")
    for folder in (out / "adapter", out / "peft"):
        poisoned(folder, auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    models, new = str(tmp_path / "models"), tmp_path / "new"
    new.mkdir()
    commands = [row for row in words(base, tuned, new) if row[0] != "presets"]
    late = [row for row in words(base, tuned, out) if row[0] in ("info", "verify", "convert", "merge", "export")]
    late = [row if "--out" not in row else [*row[:-1], row[-1].replace(str(out), str(new / "late"))] for row in late]
    doors = [DOORS.format(b=str(base), t=str(tuned), o=str(out))]
    seen = {"watched": models, "doors": doors, "cwd": base, "EVIL": f"{models}/ran"}
    found, printed, told = ran(tmp_path, [*commands, *late], **seen)
    assert [*{json.dumps(event): event for event in found["seen"]}.values()] == []
    assert not list(tmp_path.rglob("ran")) and b"Traceback" not in told and b"trust_remote_code" not in printed + told
    assert set(found["codes"]) <= {0, AT_FAULT} and 0 in found["codes"]


def test_a_module_of_the_folder_that_one_stands_in_is_not_imported(tmp_path):
    base, _ = pair(tmp_path)
    poisoned(base)
    command = [sys.executable, "-m", "tensoradapt", *"plan --model . --preset lora --rank 1 --target query".split()]
    path = {"PYTHONPATH": str(Path(ta.__file__).parents[1])}
    done = subprocess.run(command, cwd=base, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (base / "ran").exists()


# -- letters, docstrings, homes ----------------------------------------------------------------------------------------

PLACES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a home that cannot be written": {"HOME": "/dev/null/home", "MPLCONFIGDIR": None, "HF_HOME": None},
    "no home": {"HOME": None, "MPLCONFIGDIR": None, "HF_HOME": None},
}


@pytest.mark.parametrize("environment", PLACES.values(), ids=PLACES)
def test_every_command_works_there(environment, tmp_path):
    base, tuned = pair(tmp_path / LETTERS)
    found, printed, told = ran(tmp_path, words(base, tuned, tmp_path / LETTERS / "out"), **environment)
    *codes, last = found["codes"]
    assert codes == [0] * len(codes) and last == AT_FAULT, told.decode(errors="replace")[-2000:]
    assert b"Traceback" not in told and b"Error" not in told
    assert b"\\u2026" not in printed + told  # our own letters have others that stand for them
    letters = {"ascii": b"mod\\xe8le\\u2192\\xfc", "latin-1": b"mod\xe8le\\u2192\xfc"}
    assert letters.get(environment.get("PYTHONIOENCODING"), b"") in told
    if environment.get("PYTHONIOENCODING") == "ascii" or "LC_ALL" in environment:
        assert (printed + told).isascii()

    assert (tmp_path / LETTERS / "out/report/report.html").is_file()


def test_without_docstrings_what_transformers_builds_is_refused_and_the_rest_works(tmp_path):
    base, tuned = pair(tmp_path)
    rows = words(base / "model.safetensors", tuned / "model.safetensors", tmp_path / "out")[:-1]
    rows = [[word for word in row if word != "lotr_by_role"] for row in rows]
    helps = [[name, "--help"] for name in dict.fromkeys(row[0] for row in rows)]
    found, printed, told = ran(tmp_path, [*rows, ["plan", "--model", str(base), "--preset", "lora"], *helps], "-OO")
    assert found["codes"] == [0] * len(rows) + [AT_FAULT] + [0] * len(helps), told.decode()[-2000:]
    assert printed.count(b"Example:") >= len(helps) and b"PYTHONOPTIMIZE" in told and b"safetensors" in told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_bar_on_a_terminal_has_letters_of_the_terminal(encoding, tmp_path):
    pty = pytest.importorskip("pty")
    base, tuned = pair(tmp_path / LETTERS)
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "tensoradapt", "analyze", str(base), str(tuned)]
    path = str(Path(ta.__file__).parents[1])
    environment = {"PYTHONIOENCODING": encoding, "TERM": "xterm", "PYTHONPATH": path}
    done = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 1 << 16):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert done.wait(300) == 0, shown
    assert b"Traceback" not in shown and b"\\u28" not in shown and shown.decode(encoding)
