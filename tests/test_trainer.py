"""The Hugging Face Trainer: checkpoints of the adapter alone, resumed to the last digit, the best one loaded."""

import os
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

import tensoradapt as ta
from tensoradapt.trainer import AdapterCallback

logging.set_verbosity_error()
SPEC = ta.preset("lotr", rank=2, targets=["query", "value"], train=["classifier"], dropout=0.2)
STEPS, EVERY = 12, 4


class Rows(Dataset):
    """Random sentences, the label being what the first word says."""

    def __init__(self, count: int = 24) -> None:
        self.ids = tiny.tokens(count, 6)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[k], "labels": self.ids[k][0] % 3}


def arguments(out: Path, **more) -> TrainingArguments:
    usual = {"max_steps": STEPS, "save_steps": EVERY, "eval_steps": EVERY, "logging_steps": 1, "eval_strategy": "steps"}
    usual |= {"per_device_train_batch_size": 4, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "seed": 3}
    return TrainingArguments(out, **(usual | {"disable_tqdm": True, "save_total_limit": None} | more))


def trainer(out: Path, spec=SPEC, model=None, **more) -> tuple[Trainer, ta.Adapter]:
    model = model if model is not None else tiny.bert_classifier()
    adapter = ta.attach(model, spec)
    callbacks = [AdapterCallback(adapter)]
    rows = Rows()
    made = Trainer(model, arguments(out, **more), train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    return made, adapter


def losses(made: Trainer) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in made.state.log_history if "loss" in row}


def same(one: ta.Adapter, two: ta.Adapter) -> bool:
    return tiny.same(one.tensors(), two.tensors())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Trainer, ta.Adapter]:
    """Training without a break, with three checkpoints."""
    out = tmp_path_factory.mktemp("run")
    made, adapter = trainer(out)
    made.train()
    return out, made, adapter


def test_a_checkpoint_holds_the_adapter_alone(run):
    out, _, adapter = run
    for step in (4, 8, 12):
        folder = out / f"checkpoint-{step}"
        numbers = adapter.plan.num_trainable + adapter.plan.num_extra
        size = (folder / "adapter.safetensors").stat().st_size
        assert 4 * numbers < size < 4 * numbers + 8_000  # the plan in the header
        assert (folder / "model.safetensors").samefile(folder / "adapter.safetensors")
        assert not (folder / "config.json").exists()
        assert (folder / "optimizer.pt").exists() and (folder / "trainer_state.json").exists()


def test_load_reads_a_checkpoint(run):
    out, made, adapter = run
    model = tiny.bert_classifier()
    assert same(ta.load(out / "checkpoint-12", model), adapter)
    ids = tiny.tokens()
    assert torch.equal(model.eval()(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)


def test_transformers_does_not_take_a_checkpoint_for_a_model(run):
    with pytest.raises((OSError, ValueError), match="config.json"):
        AutoModelForSequenceClassification.from_pretrained(run[0] / "checkpoint-12")


@pytest.mark.parametrize("which", ["given", "found"])
def test_training_goes_on_to_the_last_digit(which, run, tmp_path):
    out, whole, adapter = run
    made, mine = trainer(tmp_path if which == "given" else out)
    if which == "found":
        for step in (8, 12):
            os.rename(out / f"checkpoint-{step}", out / f"kept-{step}")
    made.train(resume_from_checkpoint=str(out / "checkpoint-8") if which == "given" else True)
    assert losses(made) == losses(whole) and len(losses(made)) == STEPS
    assert same(mine, adapter)
    if which == "found":
        for step in (8, 12):
            one, two = (torch.load(out / f"{name}-{step}" / "optimizer.pt")["state"] for name in ("kept", "checkpoint"))
            assert one and all(torch.equal(one[k][name], two[k][name]) for k in one for name in one[k])


def test_the_best_is_loaded_at_the_end(tmp_path):
    made, adapter = trainer(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True
    )
    made.train()
    scores = {row["step"]: row["eval_loss"] for row in made.state.log_history if "eval_loss" in row}
    best = max(scores, key=scores.get)  # what is called best is the worst here, which is not the last
    assert best != STEPS and made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert same(adapter, ta.load(tmp_path / f"checkpoint-{best}", tiny.bert_classifier()))
    assert made.evaluate()["eval_loss"] == scores[best]


def test_the_model_that_is_saved_at_the_end_is_the_adapter(run, tmp_path):
    _, made, adapter = run
    made.save_model(tmp_path)
    assert same(ta.load(tmp_path, tiny.bert_classifier()), adapter)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 60_000


class Plain(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.bert_classifier()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels).to_tuple()


def test_a_model_without_save_pretrained(run, tmp_path):
    made, adapter = trainer(tmp_path, model=Plain())
    made.train()
    folder = tmp_path / "checkpoint-8"
    assert (folder / "model.safetensors").samefile(folder / "adapter.safetensors")
    again, mine = trainer(tmp_path / "again", model=Plain())
    again.train(resume_from_checkpoint=str(folder))
    assert losses(again) == losses(made) and same(mine, adapter)


def test_ranks_that_changed_go_on_from_the_checkpoints_own_adapter(run, tmp_path):
    out, whole, adapter = run
    made, _ = trainer(tmp_path, ta.preset("lotr", rank=1, targets=["query", "value"], train=["classifier"]))
    with pytest.raises(ta.AdapterError, match=r"(?s)another adapter than .*\(4, 2, 2\).*\(4, 1, 1\).*ta\.load"):
        made.train(resume_from_checkpoint=str(out / "checkpoint-8"))
    model = tiny.bert_classifier()
    mine = ta.load(out / "checkpoint-8", model)
    made = Trainer(
        model, arguments(tmp_path), train_dataset=Rows(), eval_dataset=Rows(), callbacks=[AdapterCallback(mine)]
    )
    made.train(resume_from_checkpoint=str(out / "checkpoint-8"))
    assert losses(made) == losses(whole) and same(mine, adapter)


def test_a_checkpoint_of_another_adapter_is_not_taken_for_a_fresh_start(run, tmp_path):
    made, _ = trainer(tmp_path, ta.preset("lora", rank=2, targets=["key"]))
    with pytest.raises(ta.AdapterError, match="another adapter than 'default'"):
        made.train(resume_from_checkpoint=str(run[0] / "checkpoint-8"))


def test_a_checkpoint_without_an_adapter_is_not_taken_for_one(tmp_path):
    base = Trainer(
        tiny.bert_classifier(), arguments(tmp_path, save_only_model=True), train_dataset=Rows(), eval_dataset=Rows()
    )
    base.train()
    made, _ = trainer(tmp_path / "new")
    with pytest.raises(ta.AdapterError, match="step 8 from a checkpoint that holds no adapter"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_what_no_checkpoint_would_hold_is_not_trained(tmp_path):
    made, _ = trainer(tmp_path, ta.preset("lora", rank=2, targets=["query"]))
    made.model.classifier.requires_grad_(True)
    with pytest.raises(ta.AdapterError, match=r"(?s)2 trained parameters .*classifier\.weight.*train="):
        made.train()


def test_a_model_that_is_made_anew(tmp_path):
    model = tiny.bert_classifier()
    callback = AdapterCallback(ta.attach(model, SPEC))
    made = Trainer(
        model_init=lambda: tiny.bert_classifier(),
        args=arguments(tmp_path),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[callback],
    )
    with pytest.raises(ta.AdapterError, match="not on the model that is trained"):
        made.train()


# -- what no gradient reaches -----------------------------------------------------------------------------------------


class Bypassed(nn.Module):
    """A head whose output passes no gradient on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = tiny.bert(), nn.Linear(16, 3)

    def forward(self, input_ids, labels):
        first = self.body(input_ids=input_ids).last_hidden_state[:, 0]
        logits = first[:, :3] + self.head(first).detach()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("targets", [["query", "head"], ["query"]])
def test_factors_that_no_gradient_reaches_are_named(targets, tmp_path):
    made, _ = trainer(tmp_path, ta.preset("lora", rank=2, targets=targets), Bypassed(), eval_strategy="no")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made.train()
    said = [str(warning.message) for warning in seen if "no gradient has reached" in str(warning.message)]
    assert len(said) == (1 if "head" in targets else 0)
    assert all("2 tensors of adapter 'default'" in line and "head" in line for line in said)
