"""Settings that every test process starts with, before torch is imported."""

import os

# Two processes of two threads each on two cores are slower than two of one, and sums then depend on the thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

from hypothesis import settings

# A deadline per example would fail on a busy machine; in CI the examples are the same in every run.
settings.register_profile("tensoradapt", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("tensoradapt")


def pytest_addoption(parser):
    which = (
        "what tests/device runs on: cuda, or a simulated accelerator, alone and with -n 0, for torch keeps it for good"
    )
    parser.addoption("--device", default="cuda", choices=("cuda", "sim", "sim-without-float64"), help=which)
    parser.addoption("--zoo", default="part", choices=("part", "all"), help="cells of tests/zoo: a fixed third, or all")
    parser.addoption("--kills", default="few", choices=("few", "all"), help="steps of tests/test_kills.py")
