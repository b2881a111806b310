"""The corpus: the smallest inputs that once escaped, each a folder of the files in which it differs from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from fuzz.mutations import Files
from fuzz.readers import READERS, Reader

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 200_000  # bytes of a kept file: what needs more is made by a test of its own


def inputs() -> Iterator[tuple[str, str, Files]]:
    """Reader, name and files of every kept input."""
    for folder in sorted(CORPUS.glob("*/*")):
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        yield folder.parent.name, folder.name, whole(READERS[folder.parent.name], folder.name, files)


def whole(reader: Reader, name: str, changed: Files) -> Files:
    """The files of an input: the changed ones, and the others of the seed that its name begins with."""
    return {**reader.seeds()[int(name.partition("-")[0])], **changed}


def keep(reader: Reader, files: Files) -> Path | None:
    """Keep an input in the corpus, by what its files differ in from the nearest seed; None where it is too large."""
    seeds = reader.seeds()
    differing = [{n: data for n, data in files.items() if seed.get(n) != data} for seed in seeds]
    best = min(range(len(seeds)), key=lambda k: (len(differing[k]), k))
    if sum(map(len, differing[best].values())) > LARGEST:
        return None
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:10]
    folder = CORPUS / reader.name / f"{best}-{digest}"
    for name, data in differing[best].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
