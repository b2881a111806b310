"""The GLUE tasks of `finetune_text.py`: reading a split, batches of similar length, padding, metrics.

A split comes from a folder of Parquet files, `<task>/train.parquet` and `<task>/validation.parquet`, or from a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tensoradapt.errors import FileError

SCORES = {"f1": f1_score, "accuracy": accuracy_score, "matthews": matthews_corrcoef}
CHUNK = 50  # batches whose rows are sorted by length together, so that little padding is computed
LEAST = 20  # rows below which a held-out tenth says nothing


class Task(NamedTuple):
    """The text columns of a GLUE task, and its metrics by GLUE's convention, the deciding one first."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...]


TASKS = {
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",)),
    "cola": Task(("sentence",), ("matthews",)),
    "sst2": Task(("sentence",), ("accuracy",)),
}


class Row(NamedTuple):
    """One tokenised example: the model's inputs, each of shape `(position,)`, and its label."""

    inputs: dict[str, Tensor]
    label: int


def read_rows(data: str, task: str, split: str, tokenizer: Any, max_length: int, limit: int | None = None) -> list[Row]:
    """Read and tokenise one split, its first `limit` rows if given."""
    columns = _read_parquet(data, task, split) if Path(data).is_dir() else _read_hub(data, task, split)
    if missing := {*TASKS[task].columns, "label"} - columns.keys():
        raise FileError(f"{task}/{split} lacks {', '.join(sorted(missing))}", got=f"the columns {', '.join(columns)}")
    texts = [columns[name][:limit] for name in TASKS[task].columns]
    labels = columns["label"][:limit]
    if len(labels) < LEAST or not set(labels) <= {0, 1} or not all(isinstance(x, str) for text in texts for x in text):
        raise FileError(
            f"{task}/{split} cannot be used",
            got=f"{len(labels)} rows with the labels {sorted(set(map(str, labels)))[:5]}",
            expected=f"at least {LEAST} rows of text with the labels 0 and 1, no value missing",
        )
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    inputs = ({key: torch.tensor(value[i]) for key, value in encoded.items()} for i in range(len(labels)))
    return [Row(*pair) for pair in zip(inputs, labels, strict=True)]


def _read_parquet(data: str, task: str, split: str) -> dict[str, list[Any]]:
    import pyarrow.parquet

    path = Path(data, task, f"{split}.parquet")
    if not path.is_file():
        raise FileError(f"{path} is missing", expected=f"{task}/train.parquet and {task}/validation.parquet in {data}")
    columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    return columns


def _read_hub(data: str, task: str, split: str) -> dict[str, list[Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise FileError(
            f"no folder {data}", hint="name a folder, or pip install datasets to read the hub id from the hub"
        )
    import datasets

    columns: dict[str, list[Any]] = datasets.load_dataset(data, task, split=split).to_dict()
    return columns


def hold_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return nine tenths of the rows and a tenth, always the same ones."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(rows) // 10
    return [rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]]


def fingerprint(*splits: Sequence[Row]) -> str:
    """Return a hash of tokens and labels, so that results of other data are not taken for these."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            digest.update(repr((row.inputs["input_ids"].tolist(), row.label)).encode())
        digest.update(b"|")
    return digest.hexdigest()[:12]


def batches(rows: Sequence[Row], size: int, generator: torch.Generator | None = None) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length: in random order with a generator, longest first without."""
    order = _order(len(rows), generator)
    chunk = len(rows) if generator is None else size * CHUNK
    parts = (order[i : i + chunk] for i in range(0, len(rows), chunk))
    ordered = (sorted(part, key=lambda i: -len(rows[i].inputs["input_ids"])) for part in parts)
    cut = [part[i : i + size] for part in ordered for i in range(0, len(part), size)]
    yield from ([rows[i] for i in cut[turn]] for turn in _order(len(cut), generator))


def _order(count: int, generator: torch.Generator | None) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist() if generator else list(range(count))
    return order


def collate(batch: Sequence[Row], pad: int, device: str) -> dict[str, Tensor]:
    """Pad a batch to its longest row: each input `(batch, position)`, labels `(batch,)`."""
    values = {
        key: pad_sequence([row.inputs[key] for row in batch], True, pad if key == "input_ids" else 0)
        for key in batch[0].inputs
    }
    values["labels"] = torch.tensor([row.label for row in batch])
    return {key: value.to(device) for key, value in values.items()}


def score(task: str, truth: Sequence[int], guess: Sequence[int]) -> dict[str, float]:
    """Return the task's metrics, the deciding one first."""
    return {name: float(SCORES[name](truth, guess)) for name in TASKS[task].metrics}
