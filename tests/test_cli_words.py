"""Messages of the command line speak of its options: no Python, and no expression that the user did not write."""

import re
import warnings

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import BertConfig, LlamaConfig

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.cli.run.words import OPTIONS, SETTINGS, in_options

# Arguments as Python writes them, but for those after --set, which are `name=value` on the command line too.
PYTHON = re.compile(
    rf"\bta\.|=\[|=\{{|(?<!--set )\b({'|'.join({*OPTIONS, *SETTINGS})})=|\bTrue\b|\bNone\b|re:\w|mapping \{{"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, checkpoints and adapters to be wrong about."""
    place = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    LlamaConfig(**tiny._LLAMA, num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(place / "llama")
    BertConfig(**tiny._BERT, num_hidden_layers=2, architectures=["BertModel"]).save_pretrained(place / "bert")
    odd = {"blocks.0.mixer.weight": torch.randn(16, 12), "blocks.1.mixer.weight": torch.randn(16, 12)}
    base = {f"layers.{i}.{r}.weight": torch.randn(16, 12) for i in range(2) for r in "qv"}
    base["embed.weight"] = torch.randn(20, 12)
    tuned = {n: t + torch.randn(len(t), 2) @ torch.randn(2, 12) for n, t in base.items()}
    longer = {**tuned, "embed.weight": torch.randn(24, 12)}
    broken = {n: torch.full_like(t, torch.nan) if ".q." in n else t for n, t in tuned.items()}
    other = {"encoder.x.weight": torch.randn(3, 3)}
    folders = {"odd": odd, "base": base, "tuned": tuned, "longer": longer, "broken": broken, "other": other}
    for name, state in folders.items():
        (place / name).mkdir()
        save_file(state, place / name / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ta.extract(base, tuned, ta.preset("lora", rank=2, targets=["q"]), place / "lora")
        ta.extract(base, tuned, ta.preset("tt_lora", rank=2, targets=["q"]), place / "ttm")
    model = tiny.llama()
    model.config.tie_word_embeddings = True
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["embed_tokens"]), seed=0)
    tiny.shake(adapter)
    adapter.save(place / "tied")
    adapter.detach()
    model.save_pretrained(place / "tied_base")
    (place / "file").write_text("mine")
    (place / "bad.yaml").write_text("rules:\n- {preset: lora, rnak: 2}\n")
    (place / "none.yaml").write_text("rules: []\n")
    (place / "pickle").mkdir()
    (place / "pickle/pytorch_model.bin").write_bytes(b"x" * 64)
    return place


LLAMA = "plan --model llama/config.json"
ODD = "plan --model odd --preset"
PAIR = "extract base tuned --out new --preset"
BAD = [
    *(f"{LLAMA}", f"{LLAMA} --preset lroa", f"{LLAMA} --preset lora --target qq", f"{LLAMA} --preset lora --rank 0"),
    *(f"{LLAMA} --preset lora --target q_proj --set x", f"{LLAMA} --preset krona --rank 2"),
    *(f"{LLAMA} --spec none.yaml", f"{LLAMA} --spec bad.yaml", f"{LLAMA} --spec nowhere.yaml"),
    *(f"{LLAMA} --preset lora --set rank=[2,3]", f"{LLAMA} --preset lora --set scale=alpha/2"),
    *(f"{LLAMA} --preset lora --target q_proj --set exclude=q_proj", f"{LLAMA} --preset lora --set dropout=2"),
    *(f"{LLAMA} --preset fact_tt --target q_proj --target gate_proj --set slot=[5,7]",),
    *(f"{LLAMA} --preset tt_lora --target q_proj --set folds=[3,4]", f"{LLAMA} --preset lora --set train=head"),
    *(f"{LLAMA} --preset lotr --set axes=[layer]", f"{LLAMA} --preset lora --set start=zeros"),
    *(f"{LLAMA} --preset lora --set parts={{q_proj:[a,b,c]}} --target q_proj[a]",),
    *(f"{LLAMA} --preset lora --target re:*", f"{LLAMA} --preset lora --set pattern=x --target q_proj"),
    *(f"{ODD} lora", f"{ODD} lora --target query", f"{ODD} lorta --target mixer", f"{ODD} lora --target all-linear x"),
    *(f"{ODD} metatt_5d --target mixer --set heads=5", f"{ODD} lokr --target mixer --set factor=x"),
    *("plan --model file --preset lora", "plan --model nowhere --preset lora", "plan --model pickle --preset lora"),
    *(
        "plan --model /no/where --preset lora",
        "plan --model no/where@main --preset lora",
        "plan --preset lora",
        "plan --model bert --spec bad.yaml --rank 2",
    ),
    *(f"budget --model odd --preset lora --target mixer --ranks {ranks}" for ranks in ("0:4", "x", "-1", "4:1")),
    "budget --model odd --preset lora --target mixer --max-parameters 3",
    "budget --model odd --preset lora --target mixer --out x.bmp",
    "budget --model odd --preset lora --target mixer --out tuned",
    *(
        "analyze base",
        "analyze /no/where tuned",
        "analyze nowhere tuned",
        "analyze base other",
        "analyze base longer",
        "analyze base broken",
    ),
    *("analyze base tuned --device gpu", "analyze base tuned --rows some", "analyze base tuned --nonfinite some"),
    *("analyze base tuned --target zz", "analyze base tuned --out file", "analyze pickle tuned", "analyze --adapter x"),
    *(f"{PAIR} lora --error much", f"{PAIR} lora --error 0.1 --max-parameters 9", f"{PAIR} lora --max-parameters 3"),
    *(f"{PAIR} lora --error -1", f"{PAIR} lora --target zz", f"{PAIR} lotr --error noise --rank 9 --out tuned"),
    *(f"{PAIR} vera --error noise --target q", f"{PAIR} lora --rank 2 --out lora"),
    *(f"{PAIR} lorta --target q", f"{PAIR} quanta --target q --rank 2"),
    "extract base longer --preset lora --target embed --out new",
    *("convert nowhere --preset lora --out new", "convert lora --out new", "convert lora --preset lora --out ttm"),
    *("convert lora --preset lora --target zz --out new", "convert lora --preset lorta --out new"),
    *("convert lora --preset lora --error 2 --out new", "convert lora --preset lora_xs --out new"),
    *("convert lora --preset lora --max-parameters 2 --out new", "convert ttm --preset lora --out file"),
    *("export lora --to onnx --out new", "export lora --layout wide --out new"),
    *("export lora --dtype int8 --out new", "export lora --for ollama --out new", "export lora --rank 0 --out new"),
    *("export lora --task-type X --out new", "export lora --task-type SEQ_CLS --out new", "export lora --out tuned"),
    *("export nowhere --out new", "export lora --model llama --out new"),
    *("merge tied_base tied --out new", "merge base lora --out base", "merge other lora --out new"),
    *("merge nowhere lora --out new", "merge base lora --out tuned", "merge pickle lora --out new"),
    *("verify lora base other", "verify lora base tuned --tolerance -1", "verify nowhere base tuned"),
    *("verify lora base broken", "verify lora base longer --rows some", "verify tied base tuned"),
    *("plot nowhere --out x.png", "plot file --out x.png", "plot tuned --out x.png"),
]


@pytest.mark.parametrize("command", BAD)
def test_an_error_speaks_of_options(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(str(file) for file in place.rglob("*"))
    assert run(command.split()) == 2
    out, err = capsys.readouterr()
    written = " ".join(part for part in command.split() if not part.startswith("-"))
    said = [found[0] for found in PYTHON.finditer(err) if found[0] not in written]
    assert out == "" and not said, err
    assert "Traceback" not in err and len(err.splitlines()) < 12 and "  File " not in err
    assert sorted(str(file) for file in place.rglob("*")) == before


NOTED = {
    "plan --model tied_base --preset lora --target embed_tokens": "merging needs --tied",
    "plan --model llama/config.json --preset lora": "q_proj and v_proj of 2 layers",
    "export lora --out new-export --layout compact": "--max-lora-rank",
}


@pytest.mark.parametrize("command", NOTED)
def test_notes_speak_of_options(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run(command.split()) == 0
    out, err = capsys.readouterr()
    assert NOTED[command] in out and not PYTHON.search(out + err), out + err


@pytest.mark.parametrize(
    ("python", "options"),
    [
        ("write targets=['query', 'value']", "write --target query --target value"),
        ("ta.preset('lotr', targets=['query'], rank=8)", "--preset lotr --target query --rank 8"),
        ("pass heads=12 (and kv_heads= where few)", "pass --set heads=12 (and --set kv_heads=... where few)"),
        ("choose another, or overwrite=True (--overwrite)", "choose another, or --overwrite"),
        ("parts={'c_attn': ['q', 'k']} takes it apart", "--set parts='{c_attn: [q, k]}' takes it apart"),
        ("targets=['c_attn[q]'] names it", "--target 'c_attn[q]' names it"),
        ('rows="truncate" compares, rows="pad" all', "--rows truncate compares, --rows pad all"),
        ("give rank=, or error=", "give --rank, or --error"),
        ("give error or max_parameters", "give error or --max-parameters"),
        ("got: max_parameters=30,000", "got: --max-parameters 30,000"),
        ("no adapter at runs/rank=8/a, nor rank=8/x", "no adapter at runs/rank=8/a, nor rank=8/x"),
        ("--set 'heads' is no assignment; --set heads=12", "--set 'heads' is no assignment; --set heads=12"),
        ("layer out=2048 in=2048 r_out=8", "layer out=2048 in=2048 r_out=8"),
        ("exclude=['a', 'b'] drops it", "--set exclude='[a, b]' drops it"),
    ],
)
def test_arguments_become_options(python, options):
    assert in_options(python) == options
