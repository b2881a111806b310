"""From files that are right to files that are not: bytes changed anywhere, or values of their structure.

A mutation keeps what a reader checks first (JSON that parses, the length of a header, checksums), so that what stands
behind it is reached.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Files = dict[str, bytes]
Draw = Callable[[Any], Any]


@dataclass(frozen=True)
class Raw:
    """A text that stands in JSON as it is: a number of many digits, a thousand brackets."""

    text: str


@dataclass
class Pairs:
    """A JSON object whose keys may be there twice."""

    items: list[tuple[str, Any]]


LARGE = 300_000  # characters that one value becomes
DEEP = ["[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 900 + "]" * 900]
HOSTILE: Sequence[Any] = (
    *(0, 1, -1, 2, 3, 7, 8, 1.5, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**9, 10**30, 0.0, -0.0),
    *(1e308, -1e308, 1e-320, True, False, None, "", " ", "0", "1", "-1", "8", "1e9", "NaN", "true", "null"),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("1" + "0" * 400)),
    *map(Raw, DEEP),
    *([], {}, [[]], [None], [0], [1, 1], [8, 6], [-1, 4], [2**62, 2**62], [0, 4], [1.0], ["a"], {"": 0}, {"a": {}}),
    *("\x00", "a\x00b", Raw('"\\ud800"'), "\u202e", "é", "\n", "../../x", "/etc/passwd", "..", ".", "a" * 5000),
    *("<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "$x_{", "\\", "%s%n", "{0.__class__}", "=1+1"),
    *("re:(.*)*x", "re:(a|a)*b", "re:((a+)+)+$", "re:.{1000000}", "re:(.*.*.*.*.*.*)x", "re:(", "re:[", "re:(?P<a>.)"),
    *("re:(?=(.*))\\1", "re:.*", "*", "?", "[", "*" * 40 + "x", "{layer}.{layer}", "{layer}{role}", "{", "{role}" * 3),
    *(
        "auto",
        "auto:0",
        "auto:3",
        "auto:1000000",
        "auto:-1",
        "factor:0",
        "factor:-1",
        "factor:4",
        "factor:1e9",
        "auto:x",
    ),
    *(
        "head",
        "layer",
        "out",
        "in",
        "site",
        "rank",
        "core",
        "query",
        "all-linear",
        "float32",
        "BF16",
        "F4",
        "Q4",
        "gpu",
    ),
    *("out a, a in -> out in", "a -> a", "->", ",", "out " * 500, "normal(1e999)", "normal(10**9)", "uniform(1/0)"),
    *("normal(" + "9**" * 30 + "9)", "((((((", "__import__('os')", "alpha/rank", "a" * 40 + "!", "1_000", "٣", "²"),
)
TAGS = ("!!bool x", "!!int x", "!!float x", "!!python/object/apply:os.system [true]", "!!binary x", "!!timestamp x")
TAGS += (
    "!!set {a}",
    "!!omap [a]",
    "!!null x",
    "!x y",
    "&a [*a]",
    "*a",
    "<<: {a: 1}",
    "? [a]\n: b",
    "2001-01-01",
    "0x9",
)
TAGS += ("1:2:3:4", "!!str", "{{}: 1}", "{[a]: 1}", "0o7", ".inf", ".nan", "---\n...", "%YAML 9", "\t", "| \n x", "'")
TAGS += ("{? {? {a} : b} : c}", "!!map [a]", "!!seq {a: 1}", "!!pairs [a: 1]", "!!merge x", "=", "{=: 1}", "1e5", "0b2")


def parsed(text: bytes) -> Any:
    """JSON with its objects as pairs."""
    return json.loads(text, object_pairs_hook=Pairs)


def written(value: Any) -> str:
    """The JSON text of such a value."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs | dict):
        items = value.items if isinstance(value, Pairs) else list(value.items())
        return "{" + ", ".join(f"{json.dumps(key)}: {written(item)}" for key, item in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def places(value: Any, way: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The ways to all values within a value, by numbers of entries."""
    inner = [item for _, item in value.items] if isinstance(value, Pairs) else value if isinstance(value, list) else ()
    return [way, *(place for k, item in enumerate(inner) for place in places(item, (*way, k)))]


def at(value: Any, way: tuple[int, ...]) -> Any:
    for k in way:
        value = value.items[k][1] if isinstance(value, Pairs) else value[k]
    return value


def changed(value: Any, way: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
    """The value with what lies at one place changed."""
    if not way:
        return change(value)
    k, *rest = way
    if isinstance(value, Pairs):
        items = list(value.items)
        items[k] = (items[k][0], changed(items[k][1], tuple(rest), change))
        return Pairs(items)
    return [changed(item, tuple(rest), change) if j == k else item for j, item in enumerate(value)]


def mutated(draw: Draw, value: Any) -> Any:
    """One value of a structure made another: replaced, removed, doubled, renamed, wrapped, repeated or moved."""
    found = places(value)
    way = found[draw(st.integers(0, len(found) - 1))]
    how = draw(st.sampled_from(("replace", "replace", "replace", "near", "move", "remove", "double", "name", "many")))
    if how == "replace":
        new = draw(st.sampled_from(HOSTILE) | st.text(max_size=8) | st.integers() | st.floats())
        return changed(value, way, lambda old: new)
    if how == "near":
        step = draw(st.sampled_from((1, -1, 1_000_000, -8)))
        return changed(value, way, lambda old: _near(old, step))
    if how == "move":
        other = at(value, found[draw(st.integers(0, len(found) - 1))])
        return changed(value, way, lambda old: other)
    if how == "many":
        times = draw(st.sampled_from((2, 50, 3000)))
        return changed(value, way, lambda old: _many(old, times))
    parent = way[:-1]
    name = draw(st.sampled_from(("", "a", "\x00", "__class__", "r", "shape", "rank", "targets", "../x", "9" * 30)))
    return changed(value, parent, lambda old: _entry(old, way[-1] if way else 0, how, name))


def _near(old: Any, step: int) -> Any:
    if isinstance(old, bool) or not isinstance(old, int | float | str):
        return [old]
    return old + step if isinstance(old, int | float) else old + "x" * abs(step % 7)


def _many(old: Any, times: int) -> Any:
    if len(written(old)) * times > LARGE:
        return old
    if isinstance(old, Pairs):
        return Pairs([(f"{key}{k or ''}", item) for k in range(times) for key, item in old.items[:3]])
    if isinstance(old, list):
        return old[:3] * times
    return old * times if isinstance(old, str) else [old] * times


def _entry(old: Any, k: int, how: str, name: str) -> Any:
    """An object or list with an entry removed, doubled or renamed."""
    if not isinstance(old, Pairs | list):
        return {name: old}
    items = list(old.items if isinstance(old, Pairs) else old)
    if not items:
        return old
    k %= len(items)
    if how == "remove":
        items.pop(k)
    elif how == "double" or not isinstance(old, Pairs):
        items.insert(k, items[k])
    else:
        items[k] = (name, items[k][1])
    return Pairs(items) if isinstance(old, Pairs) else items


# -- files ------------------------------------------------------------------------------------------------------------


def as_json(draw: Draw, text: bytes) -> bytes:
    """JSON with one to three of its values changed."""
    value = parsed(text)
    for _ in range(draw(st.integers(1, 3))):
        value = mutated(draw, value)
    return _encoded(written(value))


def as_yaml(draw: Draw, text: bytes) -> bytes:
    """JSON is YAML: the same, and now and then one of YAML's own forms in a value's place."""
    found = as_json(draw, text)
    if draw(st.booleans()):
        spots = [k for k, byte in enumerate(found) if byte in b",]}"]
        k = draw(st.sampled_from(spots)) if spots else len(found)
        tag = draw(st.sampled_from(TAGS)).encode()
        begin = max(found.rfind(b, 0, k) for b in (b":", b",", b"[", b"{")) + 1
        return found[:begin] + b" " + tag + found[k:]
    return found


def as_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes cut, doubled, exchanged, put in or flipped."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(("put", "cut", "double", "flip", "end")))
        if how == "put":
            data[begin:end] = draw(st.binary(max_size=12) | st.sampled_from((b"\xff" * 8, b"\x00" * 64, b"[" * 5000)))
        elif how == "cut":
            del data[begin:end]
        elif how == "double":
            data[begin:begin] = data[begin:end] * draw(st.sampled_from((1, 3, 400)))
        elif how == "flip" and begin < len(data):
            data[begin] ^= 1 << draw(st.integers(0, 7))
        elif how == "end":
            del data[begin:]
    return bytes(data)


def as_safetensors(draw: Draw, data: bytes) -> bytes:
    """A safetensors file with its header changed, and its length beside it."""
    size = int.from_bytes(data[:8], "little")
    return with_header(as_json(draw, data[8 : 8 + size]), data[8 + size :])


def as_metadata(draw: Draw, data: bytes) -> bytes:
    """A safetensors file with one of the JSON texts in its metadata changed, and the checksum of it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__") or {}
    texts = sorted(name for name, text in metadata.items() if text[:1] in ("{", "["))
    if not texts:
        return as_safetensors(draw, data)
    name = draw(st.sampled_from(texts))
    metadata[name] = as_json(draw, metadata[name].encode()).decode("utf-8", "replace")
    if name != "crc32" and "crc32" in metadata:
        sums = json.loads(metadata["crc32"])
        metadata["crc32"] = json.dumps(sums | {k: zlib.crc32(metadata[name].encode()) for k in ("", name) if k in sums})
    return with_header(json.dumps(header).encode(), data[8 + size :])


def with_header(header: bytes, rest: bytes) -> bytes:
    """A safetensors file of a header and what follows it."""
    return len(header).to_bytes(8, "little") + header + rest


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


Way = Callable[[Draw, bytes], bytes]
BY_NAME: Sequence[tuple[str, tuple[Way, ...]]] = (
    (".index.json", (as_json,)),
    (".json", (as_json,)),
    (".yaml", (as_yaml,)),
    (".safetensors", (as_safetensors, as_metadata)),
)


@st.composite
def mutations(draw: Draw, seeds: Sequence[Files]) -> Files:
    """One of some files, and one or two of them changed, most often by structure."""
    files = dict(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(files)))
        ways = next((ways for end, ways in BY_NAME if name.endswith(end)), (as_bytes,))
        way = draw(st.sampled_from((*ways, *ways, *ways, as_bytes)))
        try:
            files[name] = way(draw, files[name])
        except (ValueError, RecursionError, AttributeError, TypeError, LookupError):  # its structure is gone already
            files[name] = as_bytes(draw, files[name])
    return files
