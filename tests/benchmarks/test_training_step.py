"""A training step with adapters: ours beside PEFT's LoRA, and beside the frozen model with the same gradient path."""

import copy

import peft
import pytest
import torch
import transformers
from harness import hardware, interleave, ratio, table

import tensoradapt as ta

BATCH, TOKENS, REPEATS = 8, 128, 15
TARGETS = ["query", "value"]


def model():
    """A RoBERTa-shaped encoder of 6 layers and width 768, random weights."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(num_hidden_layers=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.RobertaModel(config, add_pooling_layer=False).train()


class Step:
    """Forward, backward and an AdamW step of whatever is trainable."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def __call__(self):
        loss = self.model(**self.inputs()).last_hidden_state.square().mean()
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def steps():
    base = model()
    ids = torch.randint(5, 1000, (BATCH, TOKENS))
    plain = lambda: {"input_ids": ids}  # noqa: E731
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
    made = {"PEFT LoRA r=8": Step(peft.get_peft_model(copy.deepcopy(base), config), plain)}
    made["PEFT LoRA r=8 again"] = Step(peft.get_peft_model(copy.deepcopy(base), config), plain)
    for name in ("lora", "lotr"):
        adapted = copy.deepcopy(base)
        ta.attach(adapted, ta.preset(name, rank=8, targets=TARGETS))
        made[f"ours {name} r=8"] = Step(adapted, plain)
    frozen = copy.deepcopy(base).requires_grad_(False)
    # The gradient has to reach the first layer, as it does with an adapter there.
    embedded = frozen.embeddings(ids).detach().requires_grad_()
    made["frozen model"] = Step(frozen, lambda: {"inputs_embeds": embedded})
    return made


@pytest.mark.benchmark
def test_training_step():
    timings = interleave(steps(), REPEATS)
    print(f"\n{hardware()}; batch {BATCH} x {TOKENS} tokens, {REPEATS} turns\n{table(timings, 'PEFT LoRA r=8')}")
    print(f"\n{table(timings, 'frozen model')}")
    noise = ratio(timings["PEFT LoRA r=8 again"], timings["PEFT LoRA r=8"])
    slack = max(abs(noise[1] - 1), abs(noise[2] - 1))
    for name in ("ours lora r=8", "ours lotr r=8"):
        assert ratio(timings[name], timings["PEFT LoRA r=8"])[0] <= 1.0 + slack
        assert ratio(timings[name], timings["frozen model"])[0] <= 1.05 + slack
