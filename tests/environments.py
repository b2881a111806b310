"""Every command in a process of its own kind: what it is told of, what it does there, and how each command ended."""

import json
import os
import socket
import sys

WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pickle.")
CODE = (".so", ".bin", ".pt", ".pkl")  # what a merge copies as it is, .py too, is read and not run


def watch(folder, seen):
    """Note down everything that would run, import or unpickle something of a folder, reach out, or ask."""

    def hook(event, args):
        texts = [os.fsdecode(a) if isinstance(a, str | bytes | os.PathLike) else "" for a in args]
        if event == "exec":
            texts = [getattr(args[0], "co_filename", "")]
        inside = any(folder in text for text in texts)
        if event in ("exec", "compile", "import", "marshal.loads") and inside:
            seen.append((event, texts[:2]))
        if event == "open" and inside and texts[0].endswith(CODE) and args[1] not in ("w", "x", "a"):
            seen.append((event, texts[:1]))
        within = event == "socket.__new__" and args[1] == socket.AF_UNIX  # by which a signal wakes the main thread
        if (event.startswith(WATCHED) and not within) or event == "builtins.input":
            seen.append((event, [repr(a)[:200] for a in args]))

    sys.addaudithook(hook)


def main(file):
    """Run the commands that a file lists, and write down what became of them."""
    with open(file, encoding="utf-8") as stream:
        told = json.load(stream)
    seen, codes = [], []
    doors = [compile(source, "<doors>", "exec") for source in told["doors"]]
    from tensoradapt.cli.app import run

    if told["watched"]:
        import matplotlib.font_manager  # noqa: F401  # it may ask the system for its fonts, once
        import peft  # noqa: F401
        import transformers  # noqa: F401

        watch(told["watched"], seen)
    for words in told["commands"]:
        words = [os.fsdecode(word.encode()) for word in words]  # as Python decodes what it is called with
        sys.argv = ["tensoradapt", *words]
        sys.stdout.write(f"\n== {words[0]}\n")
        sys.stderr.write(f"\n== {words[0]}\n")
        codes.append(run(words))
    for door in doors:
        exec(door, {})
    sys.stdout.flush()
    with open(told["out"], "w", encoding="utf-8") as stream:
        json.dump({"codes": codes, "seen": seen}, stream)


if __name__ == "__main__":
    main(sys.argv[1])
