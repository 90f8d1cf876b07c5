"""Every method again, in a few lines of float64 numpy, from the papers and nothing else.

Arrays of any shape; `models` and `base` are float64 copies of what the methods are given.
"""

import hashlib
import math

import numpy as np


def float64(tensor):
    return tensor.double().numpy()


def linear(models, *, weight, normalize=True):
    total = sum(w * x for w, x in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def slerp(a, b, t):
    """Shoemake's formula on the vectors as they are, with the angle of their directions."""
    norm_a, norm_b = np.linalg.norm(a.ravel()), np.linalg.norm(b.ravel())
    unit_a = a / norm_a if norm_a > 1e-8 else a
    unit_b = b / norm_b if norm_b > 1e-8 else b
    cosine = np.clip((unit_a * unit_b).sum(), -1.0, 1.0)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def stock_ratio(offsets):
    """N cos / (1 + (N - 1) cos) of flat offsets, cos their mean pairwise cosine."""
    n = len(offsets)
    cosines = [
        np.dot(offsets[i], offsets[j])
        / max(np.linalg.norm(offsets[i]) * np.linalg.norm(offsets[j]), 1e-6)
        for i in range(n)
        for j in range(i)
    ]
    cosine = np.mean(cosines)
    denominator = 1 + (n - 1) * cosine
    return n * cosine / denominator if abs(denominator) > 1e-6 else 0.0


def model_stock(models, base, *, ratio=None):
    t = stock_ratio([(m - base).ravel() for m in models]) if ratio is None else ratio
    return t * np.mean(models, axis=0) + (1 - t) * base


def task_arithmetic(models, base, *, weight, normalize=False, scaling=1.0):
    total = sum(w * (m - base) for w, m in zip(weight, models, strict=True))
    return base + scaling * (total / sum(weight) if normalize else total)


def cut(magnitudes, density):
    """The smallest of the max(1, int(density * n)) largest magnitudes."""
    n = magnitudes.size
    keep = n if density >= 1 else max(1, int(density * n)) if density > 0 else 0
    return np.inf if keep == 0 else np.sort(magnitudes, axis=None)[n - keep]


def trim(delta, density):
    return np.where(np.abs(delta) >= cut(np.abs(delta), density), delta, 0.0)


def elect_and_merge(deltas, weight, *, normalize, by="weighted"):
    """Disjoint merge: what has the sign of the weighted sum, zero counting as positive; by the
    paper, of the plain sum."""
    weighted = np.stack([w * d for w, d in zip(weight, deltas, strict=True)])
    votes = weighted if by == "weighted" else np.stack(deltas)
    elected = np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)
    agrees = np.sign(votes) == elected
    total = np.where(agrees, weighted, 0.0).sum(axis=0)
    if not normalize:
        return total
    shape = (len(weight),) + (1,) * (agrees.ndim - 1)
    share = np.where(agrees, np.reshape(weight, shape), 0.0).sum(axis=0)
    return total / np.where(share == 0, 1.0, share)


def ties(models, base, *, weight, density, normalize=True, scaling=1.0, trimmed=None):
    """`trimmed`: the trimmed task vectors, where the threshold is not this tensor's own."""
    if trimmed is None:
        trimmed = [trim(m - base, d) for m, d in zip(models, density, strict=True)]
    return base + scaling * elect_and_merge(trimmed, weight, normalize=normalize)


def drawn(shape, *, seed, key, model, node=0):
    """SplitMix64 at (seed, node, key, model), by row-major index, in unsigned 64-bit integers."""
    place = "\0".join(map(str, (seed, node, key, model))).encode()
    stream = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        steps = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        z = np.uint64(stream) + steps * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float64) / 2**24).reshape(shape)


def dare_mask(shape, density, **place):
    return drawn(shape, **place) < density


def combined(kept, base, *, weight, elect, normalize, scaling):
    if elect:
        return base + scaling * elect_and_merge(kept, weight, normalize=normalize, by=elect)
    total = sum(w * d for w, d in zip(weight, kept, strict=True))
    return base + scaling * (total / sum(weight) if normalize else total)


def with_norm_of(delta, kept):
    """`kept` with the L1 norm of `delta`."""
    norm = np.abs(kept).sum()
    return kept * np.abs(delta).sum() / norm if norm > 1e-7 else kept


def in_band(delta, density, gamma):
    """By sorting: the largest int(gamma n) magnitudes left out, or as many as can be, the next
    int(density n) kept."""
    keep = int(density * delta.size)
    outliers = min(int(gamma * delta.size), delta.size - keep)
    order = np.argsort(-np.abs(delta), axis=None)[outliers : outliers + keep]
    mask = np.zeros(delta.size)
    mask[order] = 1.0
    return delta * mask.reshape(delta.shape)


def breadcrumbs(models, base, *, density, gamma, rescale=False, **how):
    deltas = [m - base for m in models]
    each = zip(deltas, density, gamma, strict=True)
    kept = [in_band(delta, share, skip) for delta, share, skip in each]
    if rescale:
        kept = [with_norm_of(d, k) for d, k in zip(deltas, kept, strict=True)]
    return combined(kept, base, **how)


def della_chances(delta, density, epsilon):
    """By mean rank of magnitude within a row: the middle for a row of one."""
    m = np.abs(delta).reshape(-1, delta.shape[-1])
    smaller = (m[:, None, :] < m[:, :, None]).sum(axis=-1)
    equal = (m[:, None, :] == m[:, :, None]).sum(axis=-1)
    rank = smaller + (equal - 1) / 2
    norm = rank / (m.shape[1] - 1) if m.shape[1] > 1 else np.full(m.shape, 0.5)
    return (density - epsilon + 2 * epsilon * norm).reshape(delta.shape)


def della(models, base, *, density, epsilon, rescale, seed, key="w", **how):
    kept = []
    for i, (model, share, spread) in enumerate(zip(models, density, epsilon, strict=True)):
        delta = model - base
        if not 0 < share < 1:
            kept.append(delta * share)
            continue
        chance = della_chances(delta, share, spread)
        left = delta * (drawn(delta.shape, seed=seed, key=key, model=i) < chance)
        if rescale == "density":
            left = left / chance
        kept.append(with_norm_of(delta, left) if rescale is True else left)
    return combined(kept, base, **how)


def sce(models, base, *, select_topk=1.0):
    deltas = np.stack([m - base for m in models])
    if select_topk < 1:
        varies = deltas.var(axis=0)
        keep = int(select_topk * np.count_nonzero(varies))
        mask = np.zeros(varies.size)
        mask[np.argsort(-varies, axis=None)[:keep]] = 1.0
        deltas = deltas * mask.reshape(base.shape)
    energy = [(d**2).mean() for d in deltas]
    weight = [e / sum(energy) if sum(energy) >= 1e-6 else 1 / len(models) for e in energy]
    agrees = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1.0, -1.0)
    shaped = np.reshape(weight, (-1,) + (1,) * base.ndim)
    return base + (shaped * agrees * deltas).sum(axis=0) / np.maximum(
        (shaped * agrees).sum(0), 1e-6
    )


def dare(models, base, masks, *, weight, density, elect, normalize, rescale, scaling=1.0):
    kept = []
    for model, mask, share in zip(models, masks, density, strict=True):
        delta = model - base
        left = delta * mask
        if rescale == "density" and share > 0:
            left = left / share
        elif rescale is True and np.abs(left).sum() > 1e-7:
            left = left * np.abs(delta).sum() / np.abs(left).sum()
        kept.append(left)
    how = {"elect": "weighted" if elect else None, "normalize": normalize, "scaling": scaling}
    return combined(kept, base, weight=weight, **how)


def median(models):
    """The lower of the middle two for an even number."""
    return np.sort(np.stack(models), axis=0)[(len(models) - 1) // 2]


def max_magnitude(models, base):
    deltas = np.stack([m - base for m in models])
    return base + np.take_along_axis(deltas, np.abs(deltas).argmax(0)[None], 0)[0]


def fisher(models, fishers, *, eps=1e-8):
    weight = sum(fishers)
    weighted = sum(f * x for f, x in zip(fishers, models, strict=True))
    return np.where(weight < eps, np.mean(models, axis=0), weighted / np.maximum(weight, eps))


def passthrough(model, scale=None):
    return model if scale is None else scale * model


def by_rows(formula, *arrays):
    """A formula of vectors on each row of arrays."""
    rows = [x.reshape(-1, x.shape[-1]) for x in arrays]
    merged = [formula(*vectors) for vectors in zip(*rows, strict=True)]
    return np.reshape(merged, arrays[0].shape)


def nuslerp(models, base=None, *, weight, lines=None):
    """On whole tensors, rows or columns: `lines`."""
    t = weight[1] / sum(weight) if abs(sum(weight)) >= 1e-6 else 0.5
    a, b = models if base is None else (m - base for m in models)

    def line(x, y):
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        cosine = np.clip(x.ravel() @ y.ravel() / norms, -1, 1) if norms else 0.0
        if 1 - cosine**2 < 1e-12:
            return (1 - t) * x + t * y
        angle = math.acos(cosine)
        return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)

    if lines == "columns":
        turned = [np.moveaxis(x, 0, -1) for x in (a, b)]
        merged = np.moveaxis(by_rows(line, *turned), -1, 0)
    else:
        merged = by_rows(line, a, b) if lines == "rows" else line(a, b)
    return merged if base is None else base + merged


def multislerp(models, base=None, *, weight, normalize=True, eps=1e-8):
    """Every step: to the tangent space at the mean direction, add up, back by the exponential."""
    if len(models) == 1:
        return models[0]
    xs = models if base is None else [m - base for m in models]
    weight = np.array(weight) / (sum(weight) if normalize else 1)
    norms = [np.linalg.norm(x) for x in xs]
    units = [x / (n + eps) for x, n in zip(xs, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weight, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weight, units, strict=True))
    length = np.linalg.norm(tangent) + eps
    merged = mean * math.cos(length) + tangent * math.sin(length) / length
    merged = merged * (weight @ norms)
    return merged if base is None else base + merged


def karcher(models, *, max_iter=10, tol=1e-5):
    """Logarithms at the mean, averaged; the exponential of that; again. On the vectors."""
    norms = np.array([np.linalg.norm(x) for x in models])
    units = [x / n for x, n in zip(models, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(models[0])
    mean = sum(units) / len(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip((unit * mean).sum(), -1, 1)
            if (angle := math.acos(cosine)) > max(tol, 1e-12):
                tangent += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        if (step := np.linalg.norm(tangent)) < max(tol, 1e-14):
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
    return norms.mean() * mean


def model_stock_by_rows(models, base):
    def row(origin, *vectors):
        return model_stock(vectors, origin)

    return by_rows(row, base, *models)


def nearswap(model, base, *, t):
    """Towards the model by at most t; what is already next to it by as much of the way."""
    step = np.minimum(t / np.maximum(np.abs(model - base), 1e-6), 1.0)
    return base + step * (model - base)


def importance(model, base):
    def softmax(x):
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True) + 1e-8

    p, q = softmax(model), softmax(base)
    return np.abs(model - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)


def arcee_fusion(model, base):
    found = importance(model, base)
    ordered = np.sort(found, axis=None)
    first, median, third = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(found >= median + 1.5 * (third - first), model, base)


def ram(models, base, *, epsilon=1e-5):
    return ramplus_tl(models, base, r=0.0, epsilon=epsilon)


def ramplus_tl(models, base, *, r=0.1, alpha=0.2, epsilon=1e-5, ratios=None):
    """`ratios`: shared / unique of each model, where they are not this tensor's own."""
    deltas = np.stack([m - base for m in models])
    changed = np.abs(deltas) > epsilon
    count = changed.sum(axis=0)
    if ratios is None:
        ratios = [c[count > 1].sum() / max(c[count == 1].sum(), 1) for c in changed]
    scales = np.reshape([1 + r * min(ratio, alpha) for ratio in ratios], (-1,) + (1,) * base.ndim)
    alone = (deltas * scales * (changed & (count == 1))).sum(axis=0)
    shared = (deltas * (changed & (count > 1))).sum(axis=0) / np.maximum(count, 1)
    return base + alone + shared
