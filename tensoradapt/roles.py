"""Roles: what the weights of a model are for, told by their modules' names and by what stands beside them.

Invariant: a weight is said to hold queries, keys or values only where its own name says so, or its shape beside the
weights of the same attention leaves nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from tensoradapt.sites import Site

# What a weight holds, by the words of its name: to_q, Wq, query_proj, kv_b_proj, query_key_value, Wqkv, c_attn.
WORDS = {
    **dict.fromkeys(("q", "query", "queries", "wq"), "q"),
    **dict.fromkeys(("k", "key", "keys", "wk"), "k"),
    **dict.fromkeys(("v", "value", "values", "wv"), "v"),
    **{"kv": "kv", "qk": "qk", "qkv": "qkv", "wqkv": "qkv", "qkvz": "qkv"},
}
FUSED = {"c_attn": "qkv", "in_proj_weight": "qkv"}
FUSED_IN_ATTENTION = {"in_proj": "qkv"}  # Mamba has one, too

# The part of a layer that a module's name says, and names of weights that stand directly in a layer.
ATTENTION = ("attn", "attention")
ATTENTION_NAMES = {"self", "mha", "o_proj", "out_lin"}
FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "densereludense", "expert", "moe")
FEED_FORWARD_NAMES = {
    *("ff", "fc", "fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "wi", "intermediate", "c_fc", "fc_in", "fc_out"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"),
}
OUTPUTS = {"o", "o_proj", "out_proj", "out", "out_lin", "to_out", "dense", "proj", "c_proj", "wo"}

# Names of modules behind the layers: heads.
HEADS = ("head", "classif", "score", "logit", "qa_outputs", "vocab", "predictions", "output_projection")
HEAD_NAMES = {"cls", "embed_out", "proj_out", "decoder", "output_layer"}
EMBEDDINGS = {"wte", "wpe", "shared"}
POSITIONS = {"pos", "rel", "position", "relative"}  # words of weights that act on positions, not on tokens


def holds(path: str) -> str:
    """Which of q, k and v a weight's own name says it holds: `q`, `kv`, `qkv`; empty where it says none.

    A part of a fused weight, `c_attn[q]`, holds what the part's name says.
    """
    name, _, part = path.rpartition(".")[2].partition("[")
    if part and not part[:-1].isdecimal():
        name = part[:-1]
    found = FUSED.get(name.lower(), "") or (FUSED_IN_ATTENTION.get(name.lower(), "") if _part(path) == "attn" else "")
    said = _words(name)
    if found or (POSITIONS | {"gate"}) & set(said) or _part(path) == "ff":
        return found
    return "".join(letter for letter in "qkv" if any(letter in WORDS.get(word, "") for word in said))


def has_heads(site: Site) -> bool:
    """Whether the rows of a site can be those of its heads, one after the other: not where a weight holds several
    things, nor where it is the narrow half of a projection in two steps (`q_a_proj`)."""
    return len(holds(site.path)) < 2 and not {"a"} & set(_words(site.path.rpartition(".")[2].partition("[")[0]))


@lru_cache(maxsize=1 << 16)
def _words(name: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name))


@lru_cache(maxsize=1 << 16)
def _part(path: str) -> str:
    """`attn` or `ff` where the nearest of a path's names says so; empty where none does."""
    for name in reversed(path.lower().partition("[")[0].split(".")):
        if name in FEED_FORWARD_NAMES or any(word in name for word in FEED_FORWARD):
            return "ff"
        if name in ATTENTION_NAMES or any(word in name for word in ATTENTION):
            return "attn"
    return ""


class Roles:
    """The weights of one model by what they are for: each set is a list of sites.

    Sets other than `all-linear` are those of the numbered layers, where a model has any of the kind there.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._experts = {owner for site in sites for owner in _owners_of_experts(site.owner or site.path)}
        self._vocabulary = max((site.inp for site in sites if site.kind == "embedding"), default=0)
        linear = [site for site in sites if self._is_linear(site)]
        self.linear = [site for site in linear if not self._is_head(site)]
        self._kept = [s for s in self.linear if not (self._is_router(s) or _is_of_positions(s))]
        self._letters = {site.path: holds(site.path) for site in self._kept}
        self._tell_fused()

    def of(self, name: str) -> list[Site]:
        """The weights of a set by its name; empty where the model has none that can be told."""
        return SETS[name](self)

    def holds(self, site: Site) -> str:
        """Which of q, k and v a site holds."""
        return self._letters.get(site.path, "")

    def ordered(self, sites: Sequence[Site]) -> list[Site]:
        """The sites with queries, keys and values first, in this order."""
        return sorted(sites, key=lambda site: "qkv".find(self.holds(site)[0]) if self.holds(site) else 3)

    def query_value(self) -> list[Site]:
        """Weights that hold queries or values; empty where one of the two cannot be told."""
        return self._holding("qv")

    def qkv(self) -> list[Site]:
        """Weights that hold queries, keys or values; empty where one of the three cannot be told."""
        return self._holding("qkv")

    def attention(self) -> list[Site]:
        """Weights of queries, keys and values, and the outputs beside them."""
        beside = {_parent(site) for site in self._kept if self.holds(site)}
        found = [
            site
            for site in self._kept
            if self.holds(site) or (_parent(site) in beside and _name(site) in OUTPUTS) or self._is_attention(site)
        ]
        return _in_layers(found) if self.qkv() else []

    def feed_forward(self) -> list[Site]:
        """Weights whose names say so; where none do, those of layers with attention that are no part of it."""
        found = [site for site in self._kept if _part(site.path) == "ff"]
        attention = self.attention()
        inside, layers = {site.path for site in attention}, {_layer(site) for site in attention}
        beside = [s for s in self._kept if not _part(s.path) and _layer(s) in layers and s.path not in inside]
        ends = [site for site in self._kept if not _part(site.path) and _ends(site, "output", "dense")]
        return _in_layers(found + ([site for site in ends if "layer" in site.coordinates] if found else beside))

    def block(self) -> list[Site]:
        """Every linear weight of the numbered layers but routers; without such layers, attention and feed-forward."""
        layered = [site for site in self._kept if "layer" in site.coordinates]
        both = {site.path for site in (*self.attention(), *self.feed_forward())}
        return layered or [site for site in self._kept if site.path in both]

    def convolutions(self) -> list[Site]:
        """Every convolution."""
        return [site for site in self._sites if site.kind == "conv" or len(site.shape) == 4]

    def all_linear(self) -> list[Site]:
        """Every linear weight but heads, embeddings and routers."""
        return [site for site in self.linear if not self._is_router(site)]

    def _holding(self, letters: str) -> list[Site]:
        """Weights that hold any of the letters; none where one is missing that an unknown name beside may hold."""
        found = _in_layers([site for site in self._kept if set(self.holds(site)) & set(letters)])
        held = {letter for site in found for letter in self.holds(site)}
        beside = {_parent(site) for site in found}
        unknown = [s for s in self._kept if _parent(s) in beside and not self.holds(s) and _name(s) not in OUTPUTS]
        return found if set(letters) <= held or not unknown else []

    def _tell_fused(self) -> None:
        """An attention with no weight that says q, k or v, and one three times as high as wide: that is all three."""
        named = {_parent(site) for site in self._kept if self.holds(site)}
        for site in self._kept:
            if _part(site.path) == "attn" and site.out == 3 * site.inp and _parent(site) not in named:
                self._letters[site.path] = "qkv"

    def _is_attention(self, site: Site) -> bool:
        return _part(site.path) == "attn" and "gate" not in _words(_name(site))

    def _is_linear(self, site: Site) -> bool:
        name = _name(site)
        if len(site.shape) != 2 or site.kind in ("embedding", "conv"):
            return False
        if site.kind == "parameter":  # experts, and what nn.MultiheadAttention holds
            return site.index is not None or bool(holds(site.path)) or name == "out_proj"
        return not (name.endswith("bias") or "embed" in name.replace("embed_out", "") or name in EMBEDDINGS)

    def _is_head(self, site: Site) -> bool:
        names = (site.owner or site.path).lower().split(".")
        if "layer" in site.coordinates:  # one of a list of heads
            return names[-1].isdecimal() and "head" in _name(site) and not _part(site.path)
        said = any(word in name for word in HEADS for name in names) or bool(HEAD_NAMES & {names[0], names[-1]})
        return said or bool(site.aliases) or site.out == self._vocabulary

    def _is_router(self, site: Site) -> bool:
        parent, name = _parent(site), _name(site)
        beside = parent in self._experts or parent.rpartition(".")[0] in self._experts
        return beside and ("gate" in _words(name) and "proj" not in _words(name) or "router" in f"{parent}.{name}")


SETS: dict[str, Callable[[Roles], list[Site]]] = {
    "query-value": Roles.query_value,
    "attention": Roles.attention,
    "qkv": Roles.qkv,
    "feed-forward": Roles.feed_forward,
    "block": Roles.block,
    "convolutions": Roles.convolutions,
    "all-linear": Roles.all_linear,
}


def _owners_of_experts(path: str) -> list[str]:
    """The path of the module that holds the experts a path lies in."""
    names = path.split(".")
    return [".".join(names[:k]) for k, name in enumerate(names) if name == "experts"]


def _name(site: Site) -> str:
    names = (site.owner or site.path).split(".")
    named = [name for name in names if not name.isdecimal()]
    return (named or names)[-1].lower()


def _parent(site: Site) -> str:
    return (site.owner or site.path).rpartition(".")[0]


def _layer(site: Site) -> tuple[object, object]:
    return site.coordinates.get("stack"), site.coordinates.get("layer")


def _is_of_positions(site: Site) -> bool:
    names = [name for name in (site.owner or site.path).split(".") if not name.isdecimal()]
    return any(POSITIONS & set(_words(name)) for name in names[-2:])


def _ends(site: Site, *names: str) -> bool:
    return tuple(site.path.split(".")[-len(names) :]) == names


def _in_layers(sites: list[Site]) -> list[Site]:
    """The sites of numbered layers; all of them where none lies in one."""
    return [site for site in sites if "layer" in site.coordinates] or sites
