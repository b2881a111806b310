"""Print the lowest versions that pyproject.toml states, as constraints for pip.

PyTorch stays the one of constraints.txt: no package index has its lowest version as a build for the CPU.
"""

import re
import tomllib
from pathlib import Path

root = Path(__file__).parents[1]
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
requirements = [
    *project["dependencies"],
    *(text for extra in project["optional-dependencies"].values() for text in extra),
]
for name, lowest in (match.groups() for text in requirements if (match := re.match(r"([\w.-]+)>=([\d.]+)", text))):
    if name != "torch":
        print(f"{name}=={lowest}")
print((root / "constraints.txt").read_text())
