"""One delta: attached, merged, saved, merged into the folder, exported and extracted, an adapter is the same change.

The oracle is the model's own output, through the readers that users have: transformers for a merged folder, PEFT for an
export.
"""

import copy

import peft
import pytest
import tiny
import torch
import transformers
from torch import nn

import tensoradapt as ta

IDS = tiny.tokens()
CLOSE = 2e-5  # of the adapter's effect


def whisper():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 12}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(vocab_size=tiny.WORDS, **sizes, **ids, **heads)
    )


CALLS = {
    tiny.bert: lambda m: m(input_ids=IDS).last_hidden_state,
    tiny.gpt2: lambda m: m(input_ids=IDS).logits,
    tiny.llama: lambda m: m(input_ids=IDS).logits,
    tiny.mixtral: lambda m: m(input_ids=IDS).logits,
    tiny.t5: lambda m: m(input_ids=IDS, decoder_input_ids=IDS).logits,
    whisper: lambda m: m(input_features=tiny.noise(2, 8, 24), decoder_input_ids=IDS).logits,
}
every_model = pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
every_preset = pytest.mark.parametrize("name", ["lora", "lotr_by_role", "loha"])


class Scene:
    """A model, its folder, an adapter that changes it, and what it returns with and without."""

    def __init__(self, make, name, folder):
        torch.manual_seed(0)
        self.call, self.base = CALLS[make], make().eval()
        self.base.save_pretrained(folder / "base")
        self.folder, self.model = folder, copy.deepcopy(self.base)
        self.adapter = ta.attach(self.model, ta.preset(name, rank=2, targets="block"))
        tiny.shake(self.adapter)
        self.before, self.after = self.out(self.base), self.out(self.model)
        self.adapter.save(folder / "adapter")

    @torch.no_grad()
    def out(self, model):
        return self.call(model.eval())

    def off(self, model) -> float:
        """How far a model is from the adapted one, as a share of what the adapter does."""
        return float((self.out(model) - self.after).norm() / (self.after - self.before).norm())

    def read(self, name):
        return type(self.base).from_pretrained(self.folder / name)


@every_model
@every_preset
def test_the_delta_is_one_wherever_it_is_used(make, name, tmp_path):
    it = Scene(make, name, tmp_path)
    assert float((it.after - it.before).norm() / it.before.norm()) > 1e-3

    it.adapter.merge()
    assert it.off(it.model) < CLOSE, "merged"
    it.adapter.unmerge()
    assert it.off(it.model) < CLOSE, "unmerged"

    loaded = copy.deepcopy(it.base)
    ta.load(it.folder / "adapter", loaded)
    assert it.off(loaded) < CLOSE, "loaded"

    held = nn.Sequential(copy.deepcopy(it.base))  # the same weights under other names
    ta.load(it.folder / "adapter", held[0])
    assert it.off(held[0]) < CLOSE, "loaded inside a container"

    ta.merge_folder(it.folder / "base", it.folder / "adapter", it.folder / "merged")
    assert it.off(it.read("merged")) < CLOSE, "merged into the folder"

    found = ta.verify(it.folder / "adapter", it.folder / "base", it.folder / "merged")
    assert found.relative_error < CLOSE, "verified"

    spec = ta.preset("lora", rank=8)
    ta.extract(it.folder / "base", it.folder / "merged", spec, it.folder / "extracted", error=1e-6)
    again = copy.deepcopy(it.base)
    ta.load(it.folder / "extracted", again)
    assert it.off(again) < 10 * CLOSE, "extracted and loaded"


@pytest.mark.parametrize("make", [m for m in CALLS if m is not tiny.mixtral], ids=lambda make: make.__name__)
@every_preset
def test_peft_reads_the_delta(make, name, tmp_path):
    it = Scene(make, name, tmp_path)
    ta.export_peft(it.folder / "adapter", it.folder / "peft", model=it.base)
    reader = peft.PeftModel.from_pretrained(copy.deepcopy(it.base), it.folder / "peft")
    assert it.off(reader) < 10 * CLOSE
    back = copy.deepcopy(it.base)
    ta.import_peft(it.folder / "peft", model=it.base).save(it.folder / "back")
    ta.load(it.folder / "back", back)
    assert it.off(back) < 10 * CLOSE
