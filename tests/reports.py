"""Reports made of real random deltas with plain numpy, so that all of their numbers agree with each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ROLES = {"attention.query": (24, 16), "attention.value": (24, 16), "output.dense": (16, 24)}
RULES = ("energy_0.9", "energy_0.95", "energy_0.99")
LONG = "transformer.block_of_a_rather_long_name.attention_with_rotary_embedding.query_projection_of_all_heads"


def deltas(roles, layers, *, rank=4, noise=2e-3, seed=0, stacks=("encoder.layer",), tasks=(), experts=0, scale=1.0):
    """Random changes of low rank with part of their column space in common, and Gaussian noise on top."""
    rng = np.random.default_rng(seed)
    common = {role: rng.standard_normal((rank, out)) for role, (out, _) in roles.items()}
    found = {}
    for stack in stacks:
        for task in tasks or (None,):
            for layer in range(layers):
                for expert in range(experts) if experts else (None,):
                    for role, (out, into) in roles.items():
                        many = 1 + (layer + 3 * len(role)) % (2 * rank)
                        own = rng.standard_normal((out, many))
                        left = (np.resize(common[role], (many, out)).T + 0.5 * own) / math.sqrt(out * into * rank)
                        right = rng.standard_normal((many, into)) * 0.7 ** np.arange(many)[:, None]
                        delta = scale * (left @ right + noise * rng.standard_normal((out, into)))
                        coordinates = {"stack": stack, "layer": layer, "expert": expert, "task": task, "role": role}
                        parts = (task, stack, layer, expert if expert is None else f"experts.{expert}", role)
                        path = ".".join(str(part) for part in parts if part is not None)
                        found[path] = ({k: v for k, v in coordinates.items() if v is not None}, delta)
    return found


def site(delta, coordinates, group, *, values=128, sigma=2e-3, base=1.0) -> dict[str, Any]:
    """One site's record, by numpy's SVD."""
    all_of = np.linalg.svd(delta, compute_uv=False)
    energy = float((all_of**2).sum())
    kept = all_of[:values]
    edge = sigma * (math.sqrt(delta.shape[0]) + math.sqrt(delta.shape[1]))

    def known(rank):
        return None if rank > len(kept) else int(rank)

    above = int((all_of > edge).sum()) if energy else 0
    within = np.cumsum(all_of**2) / energy if energy else np.ones(len(all_of))
    ranks = {rule: known(int((within < float(rule[7:]) - 1e-12).sum()) + 1) if energy else 0 for rule in RULES}
    p = all_of**2 / energy if energy else None
    return {
        **{"shape": list(delta.shape), "coordinates": coordinates, "group": group, "dtypes": ["bfloat16", "bfloat16"]},
        **{"norm": math.sqrt(energy), "relative_change": math.sqrt(energy) / base},
        **{"spectral_norm": float(all_of[0]), "singular_values": kept.tolist(), "complete": len(kept) == len(all_of)},
        **{"residual": math.sqrt(max(0.0, energy - float((kept**2).sum()))), "method": "exact"},
        "stable_rank": energy / float(all_of[0]) ** 2 if energy else None,
        "effective_rank": float(np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum())) if energy else None,
        "participation_ratio": float(1 / (p**2).sum()) if energy else None,
        "noise": {"sigma": sigma, "edge": edge, "scaled": False},
        "ranks": {"noise": known(above), **ranks, "gavish_donoho": known(above), "marchenko_pastur": known(above)},
    }


def unfoldings(tensor, axes):
    """The singular values of every unfolding, and of every cut of the train."""
    modes, cuts = {}, {}
    for k, axis in enumerate(axes):
        modes[axis] = np.linalg.svd(np.moveaxis(tensor, k, 0).reshape(tensor.shape[k], -1), compute_uv=False).tolist()
    for k in range(1, len(axes)):
        matrix = tensor.reshape(math.prod(tensor.shape[:k]), -1)
        cuts[" ".join(axes[:k])] = np.linalg.svd(matrix, compute_uv=False).tolist()
    return modes, cuts


def similarity(members, side, rank):
    """Mean squared cosines between leading subspaces, `rank` directions each."""
    bases = {}
    for path, delta in members.items():
        u, _, vh = np.linalg.svd(delta, full_matrices=False)
        bases[path] = u[:, :rank] if side == "out" else vh[:rank].T
    still = [not np.any(delta) for delta in members.values()]
    matrix = [[float((a.T @ b).ravel() @ (a.T @ b).ravel()) / rank for b in bases.values()] for a in bases.values()]
    for i, j in np.ndindex(len(still), len(still)):
        if still[i] or still[j]:
            matrix[i][j] = None
        elif i == j:
            matrix[i][j] = 1.0
    return {"rank": rank, "labels": list(members), "matrix": matrix}


def shared_energy(members):
    """The energy in one pair of subspaces for all, and in one for each."""
    stacked = np.stack(list(members.values()))
    total = float((stacked**2).sum()) or 1.0
    u = np.linalg.svd(np.concatenate(list(stacked), 1))[0]
    v = np.linalg.svd(np.concatenate([d.T for d in stacked], 1))[0]
    ranks = [r for r in (1, 2, 4, 8, 16, 32, 64) if r <= min(stacked.shape[1:])]
    shared = [float(((u[:, :r].T @ stacked @ v[:, :r]) ** 2).sum()) / total for r in ranks]
    own = [np.linalg.svd(delta, compute_uv=False) ** 2 for delta in members.values()]
    private = [float(sum(values[:r].sum() for values in own)) / total for r in ranks]
    return {"rank": ranks, "shared": shared, "private": private}


def group(members, sites, *, sigma):
    """One group's record: the tensor stacked over layer and role (or task), every number by numpy."""
    at = {path: sites[path]["coordinates"] for path in members}
    outer = [a for a in ("stack", "task", "layer", "expert", "role") if len({c.get(a) for c in at.values()}) > 1]
    labels = {a: list(dict.fromkeys(c[a] for c in at.values())) for a in outer}
    some = next(iter(members.values()))
    tensor = np.zeros((*map(len, labels.values()), *some.shape))
    for path, delta in members.items():
        tensor[tuple(labels[a].index(at[path][a]) for a in outer)] = delta
    axes = [*outer, "out", "in"]
    sizes = dict(zip(axes, tensor.shape, strict=True))
    modes, cuts = unfoldings(tensor, axes)
    edges = {a: sigma * (math.sqrt(sizes[a]) + math.sqrt(tensor.size / sizes[a])) for a in axes}
    rank = min(4, *some.shape)
    return {
        **{
            "axes": axes,
            "sizes": sizes,
            "labels": labels,
            "sites": list(members),
            "norm": float(np.sqrt((tensor**2).sum())),
        },
        **{"captured": 1.0, "mode_spectra": modes, "noise_edges": edges, "tt_spectra": cuts},
        "multilinear_rank": {
            "noise": {a: sum(value > edges[a] for value in modes[a]) for a in axes},
            "energy_0.95": {a: holding(modes[a], 0.95) for a in axes},
        },
        "similarity": {side: similarity(members, side, rank) for side in ("out", "in")},
        "shared_energy": shared_energy(members),
    }


def holding(values, share):
    energy = np.cumsum(np.square(values))
    return int((energy < share * energy[-1] - 1e-12).sum()) + 1 if energy[-1] else 0


def candidates(groups, by_group):
    """LoRA and LoTR at some ranks: parameters counted, errors from the discarded energy."""
    found = []
    total = sum(float((d**2).sum()) for members in by_group.values() for d in members.values())
    dense = sum(d.size for members in by_group.values() for d in members.values())
    for rank in (1, 2, 4, 8, 16):
        for preset in ("lora", "lotr"):
            lost, counts, worst = 0.0, {}, (0.0, "")
            for name, members in by_group.items():
                energy = groups[name]["shared_energy"]
                shared = dict(zip(energy["rank"], energy["shared"], strict=True))
                if preset == "lotr" and rank not in shared:
                    break
                own = sum(float((d**2).sum()) for d in members.values())
                out, into = next(iter(members.values())).shape
                losses = {p: float((np.linalg.svd(d, compute_uv=False)[rank:] ** 2).sum()) for p, d in members.items()}
                lost += sum(losses.values()) if preset == "lora" else own * (1 - shared[rank])
                each = {p: math.sqrt(v / (float((members[p] ** 2).sum()) or 1.0)) for p, v in losses.items()}
                worst = max(worst, max((e, p) for p, e in each.items()))
                many = len(members)
                counts[name] = many * rank * (out + into) if preset == "lora" else rank * (out + into) + many * rank**2
            else:
                error = math.sqrt(max(0.0, lost) / total) if total else 0.0
                label = {"lora": "LoRA", "lotr": "LoTR"}[preset]
                found += [
                    {
                        **{"label": f"{label} r={rank}", "preset": preset, "rank": rank},
                        **{"num_parameters": sum(counts.values()), "relative_error": error},
                        "share": sum(counts.values()) / dense,
                        "worst_site": {"path": worst[1] or next(iter(members)), "relative_error": worst[0]},
                        **{"by_group": counts, "front": False},
                    }
                ]
    for one in found:
        one["front"] = not any(beats(other, one) for other in found)
    return found


def beats(a, b) -> bool:
    x, y = ((c["num_parameters"], c["relative_error"]) for c in (a, b))
    return x != y and x[0] <= y[0] and x[1] <= y[1]


def report(roles=None, layers=4, *, kind="checkpoints", values=128, sigma=2e-3, by_role=True, still=(), **made):
    """A whole report. `still`: roles that did not change; `by_role`: a group per role, else one per shape."""
    roles = ROLES if roles is None else roles
    found = deltas(roles, layers, **{"noise": sigma or 2e-3, **made})
    found = {path: (c, delta * (c["role"] not in still)) for path, (c, delta) in found.items()}
    names = {path: c["role"] if by_role else "x".join(map(str, d.shape)) for path, (c, d) in found.items()}
    sites = {p: site(d, c, names[p], values=values, sigma=sigma) for p, (c, d) in found.items()}
    by_group: dict[str, dict[str, Any]] = {}
    for path, (_, delta) in found.items():
        by_group.setdefault(names[path], {})[path] = delta
    groups = {name: group(members, sites, sigma=sigma) for name, members in by_group.items()}
    rows = candidates(groups, by_group)
    front = [row for row in rows if row["front"]]
    chosen = front[len(front) // 2]
    return {
        **{"format": "tensoradapt.report", "version": 1, "kind": kind, "base": "tiny-bert", "tuned": "tiny-bert-mrpc"},
        "settings": {"values": values, "seed": 0},
        "match": {
            **{"matched": len(sites), "only_base": [], "only_tuned": ["classifier.weight"], "reshaped": []},
            **{"refused": {"embeddings.position_ids": "not a weight: int64"}, "notes": []},
        },
        **{
            "sites": sites,
            "groups": groups,
            "candidates": rows,
            "answer": answer(sites, rows),
            "change": change(sites),
        },
        "choice": {
            **{"label": chosen["label"], "reason": "The smallest on the front with an error below a half."},
            **{"rule": "the middle of the front.", "warning": "", "holds": True, "reference": chosen["label"]},
        },
        "comparisons": comparisons(rows),
    }


def answer(sites, rows):
    """Medians over the weights that differ, and the smallest candidate within each error, or else the largest LoRA."""
    still = [row for row in sites.values() if row["norm"]]
    if not still:
        return None
    dense, needed = sum(math.prod(row["shape"]) for row in still), []
    for error in (0.1, 0.01):
        within = [c for c in rows if c["relative_error"] <= error]
        best = min(within, key=lambda c: c["num_parameters"]) if within else rows[-1]
        taken = {key: best[key] for key in ("label", "preset", "rank", "num_parameters")}
        reached = best["relative_error"] if within else None
        needed += [{"relative_error": error, **taken, "share": best["num_parameters"] / dense, "reached": reached}]
        needed[-1]["at_least"] = not within
    noisy = any(row["noise"]["edge"] for row in still)
    rules = (*(("noise",) if noisy else ()), "energy_0.95")
    share = min(1.0, 2e-3 * math.sqrt(dense / sum(row["norm"] ** 2 for row in still))) if noisy else None
    counts = {"weights": len(still), "layers": True, "dense": dense, "noise_share": share}
    return {**counts, "ranks": {rule: middle(still, rule) for rule in rules}, "needed": needed}


def middle(rows, rule):
    known = sorted(math.inf if (r := row["ranks"][rule]) is None else r for row in rows)
    three = [None if r == math.inf else r for r in (known[len(known) // 2], known[0], known[-1])]
    computed = [len(row["singular_values"]) for row in rows if row["ranks"][rule] is None]
    return dict(zip(("median", "lowest", "highest", "computed"), (*three, min(computed, default=None)), strict=True))


def change(sites):
    """All weights in the layers, and some vectors that hold a thousandth of the squared change."""
    squares = sum(row["norm"] ** 2 for row in sites.values())
    differing = sum(row["norm"] > 0 for row in sites.values())
    shares = (0.999, 0.001) if squares else (None, None)
    kinds = {
        "layers": {"tensors": len(sites), "differing": differing, "weights": len(sites), "share": shares[0]},
        "vectors": {"tensors": 7, "differing": 5 * (squares > 0), "weights": 0, "share": shares[1]},
    }
    counts = {key: sum(row[key] for row in kinds.values()) for key in ("tensors", "differing")}
    return {**counts, "norm": math.sqrt(squares / 0.999), "kinds": kinds}


def comparisons(rows):
    """The smallest candidate of every preset within an error, the best within a budget."""
    errors, budgets = (0.5, 0.25), sorted({row["num_parameters"] for row in rows})[2:4]
    at_error, at_budget = [], []
    for limit in errors:
        within = [r for r in rows if r["relative_error"] <= limit]
        best = {r["preset"]: r for r in sorted(within, key=lambda r: -r["num_parameters"])}
        pairs = [{"label": r["label"], "num_parameters": r["num_parameters"]} for r in best.values()]
        at_error.append({"relative_error": limit, "rows": pairs})
    for limit in budgets:
        within = [r for r in rows if r["num_parameters"] <= limit]
        best = {r["preset"]: r for r in sorted(within, key=lambda r: -r["relative_error"])}
        pairs = [{"label": r["label"], "relative_error": r["relative_error"]} for r in best.values()]
        at_budget.append({"max_parameters": limit, "rows": pairs})
    return {"at_error": at_error, "at_budget": at_budget}


def many_roles(count: int) -> dict[str, tuple[int, int]]:
    return {f"{LONG}.number_{k}": (16 + 8 * (k % 3), 16) for k in range(count)}


def bare(**changes):
    """A report in which nothing was found."""
    empty = report(layers=1) | {"sites": {}, "groups": {}, "candidates": [], "choice": None, "answer": None}
    return empty | {"comparisons": {"at_error": [], "at_budget": []}} | changes


def only_chosen(found):
    return found | {"candidates": [c for c in found["candidates"] if c["label"] == found["choice"]["label"]]}


def many_presets(found, count: int):
    """The report with candidates of `count` presets around its own."""
    rng = np.random.default_rng(0)
    size = found["candidates"][0]["num_parameters"]
    extra = []
    for preset, rank in ((p, r) for p in range(count) for r in (1, 2, 4, 8, 16)):
        parameters = int(size * rank * rng.uniform(0.5, 3))
        extra.append(
            {
                **{"label": f"Preset {preset} r={rank}", "preset": f"preset_{preset}", "rank": rank, "front": False},
                **{"num_parameters": parameters, "relative_error": float(min(1.0, rng.uniform(0.4, 1) / rank**0.6))},
                **{"worst_site": None, "by_group": {name: parameters for name in list(found["groups"])[:1]}},
            }
        )
    rows = [dict(row) for row in [*found["candidates"], *extra]]
    for row in rows:
        row["front"] = not any(beats(other, row) for other in rows)
    chosen = sorted((r for r in rows if r["front"]), key=lambda r: r["num_parameters"])[2]
    return found | {"candidates": rows, "choice": {"label": chosen["label"], "reason": "It is on the front."}}


EXTREMES = {
    "plain": lambda: report(),
    "bert": lambda: report(
        {f"attention.self.{r}": (48, 48) for r in ("query", "key", "value")} | {"intermediate.dense": (96, 48)},
        12, by_role=False,
    ),
    "one layer": lambda: report({"query": (24, 16)}, 1),
    "eighty layers": lambda: report({r: (16, 16) for r in ("q_proj", "k_proj", "v_proj", "o_proj")}, 80),
    "twelve groups of long names": lambda: report(many_roles(12), 2),
    "fifty roles": lambda: report(many_roles(50), 1),
    "nothing changed": lambda: report(scale=0.0),
    "some did not change": lambda: report(still=("output.dense",)),
    "ranks unknown": lambda: report(values=2),
    "float32": lambda: report(sigma=0.0),
    "adapters": lambda: report(kind="adapters", layers=6, tasks=("mrpc", "sst2", "cola")),
    "twenty tasks": lambda: report(kind="adapters", layers=6, tasks=[f"a_task_of_some_length_{k}" for k in range(20)]),
    "two stacks": lambda: report(stacks=("encoder.layers", "decoder.layers"), layers=12),
    "experts": lambda: report({"w1": (16, 16), "w2": (16, 16)}, 8, experts=16),
    "thirty presets": lambda: many_presets(report(), 30),
    "one candidate": lambda: only_chosen(report()),
    "hostile names": lambda: report({"<script>alert(1)</script>": (16, 16), "$x_1^$ & \"q\"\n--><b>": (16, 16)}, 2),
}  # fmt: skip
