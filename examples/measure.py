"""What one format costs on the encoder: bytes, agreement with float32, seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import bert
import numpy as np
from bert import Array

import lowbit as lb

BATCH = 32
ALONE = 30  # sentences that are timed one by one: every tenth of the 300, by length
TOP = 10


@dataclass(frozen=True)
class Scheme:
    """Format of the weights (None: dense float32) and, when they are quantized, of activations."""

    weights: str | None
    activations: str | None = None

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """`float32`, a format's name, or two of them with a colon: weights:activations."""
        if text == "float32":
            return cls(None)
        names = text.split(":", 1)
        for name in names:
            lb.format(name)  # raises ValueError for what is none
        return cls(*names)

    @property
    def label(self) -> str:
        """`int8_row W8A8` where weights and activations are alike, else the names."""
        if self.activations is None:
            return self.weights or "float32"
        if self.activations != self.weights:
            return f"{self.weights}:{self.activations}"
        bits = lb.format(self.weights).element.bits
        return f"{self.weights} W{bits}A{bits}"

    @property
    def family(self) -> str:
        """Which colour the picture gives it."""
        name = (self.weights or "float32").lower()
        if name.startswith(("mx", "nv", "float4", "float6")):
            return "MX, NVFP4"
        if name.startswith(("float8", "fp8")):
            return "float8"
        if name.startswith("uint") or "asym" in name:
            return "integer with zero point"
        return "integer" if name.startswith("int") else "codebook"


@dataclass
class Clock:
    """Seconds spent in linear layers, and the kernels they chose while `asking`."""

    seconds: float = 0.0
    asking: bool = False
    kernels: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Run:
    """All sentences, or some, at one batch size."""

    batch: int
    sentences: int
    gemm_seconds: float
    seconds: float
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One row of the table; `batch_1` and `batch_32` are timed after a warm-up batch."""

    label: str
    weights: str
    activations: str
    linear_bytes: int
    model_bytes: int
    cosine_mean: float
    cosine_worst: float
    top_1_equal: float
    top_10_overlap: float
    quantize_seconds: float
    batch_1: Run
    batch_32: Run


def dense_layer(clock: Clock, linear: bert.Linear) -> bert.Layer:
    """NumPy's float32 product; its gelu is not a GEMM's epilogue, so the clock leaves it out."""
    product = bert.dense(dataclasses.replace(linear, activation=None))

    def run(x: Array) -> Array:
        start = time.perf_counter()
        y = product(x)
        clock.seconds += time.perf_counter() - start
        clock.kernels |= {"NumPy BLAS"} if clock.asking else set()
        return bert.gelu(y) if linear.activation == "gelu" else y

    return run


def lowbit_layer(clock: Clock, scheme: Scheme, weight: Any, linear: bert.Linear) -> bert.Layer:
    """lowbit's product with its bias and gelu."""
    options: dict[str, Any] = {"bias": linear.bias, "activation": linear.activation}
    if scheme.activations:
        options["x_format"] = scheme.activations

    def run(x: Array) -> Array:
        if clock.asking:
            clock.kernels.add(lb.explain(x, weight.mT, **options).kernel)
        start = time.perf_counter()
        y: Array = lb.linear(x, weight, **options)
        clock.seconds += time.perf_counter() - start
        return y

    return run


def embed(
    encoder: bert.Encoder,
    clock: Clock,
    tokens: Sequence[Sequence[int]],
    batch: int,
    step: Callable[[int], None],
) -> tuple[Array, Run]:
    """Embeddings in the order of `tokens`; the middle batch runs once more, first and unclocked."""
    groups = list(bert.batches(tokens, batch, encoder.model.pad_id))
    clock.asking, clock.kernels = True, set()
    _, ids, mask = groups[len(groups) // 2]
    encoder(ids, mask)
    clock.asking, clock.seconds = False, 0.0
    out = np.empty((len(tokens), encoder.model.words.shape[1]), np.float32)
    seconds = 0.0
    for chosen, ids, mask in groups:
        start = time.perf_counter()
        out[chosen] = encoder(ids, mask)
        seconds += time.perf_counter() - start
        step(len(chosen))
    return out, Run(batch, len(tokens), clock.seconds, seconds, tuple(sorted(clock.kernels)))


def alone(tokens: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """ALONE sentences spread evenly over the lengths, or all where there are fewer."""
    by_length = sorted(tokens, key=len)
    count = min(ALONE, len(by_length))
    return [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]


def agreement(embeddings: Array, baseline: Array) -> dict[str, float]:
    """Cosine sentence by sentence, and neighbours found when each sentence asks all others."""
    cosines, orders = [], []
    for e in (embeddings, baseline):
        unit = e / np.linalg.norm(e.astype(np.float64), axis=1, keepdims=True)
        similar = unit @ unit.T
        np.fill_diagonal(similar, -np.inf)
        cosines.append(unit)
        orders.append(np.argsort(-similar, axis=1, kind="stable")[:, : min(TOP, len(e) - 1)])
    cosine = (cosines[0] * cosines[1]).sum(axis=1)
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*orders, strict=True)]
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_worst": float(cosine.min()),
        "top_1_equal": float((orders[0][:, 0] == orders[1][:, 0]).mean()),
        "top_10_overlap": float(np.mean(shared)),
    }


def measure(
    model: bert.Model,
    scheme: Scheme,
    tokens: Sequence[Sequence[int]],
    baseline: Array | None,
    step: Callable[[int], None],
) -> tuple[Array, Result]:
    """Quantize, embed everything in batches, embed some one by one, compare with float32."""
    clock = Clock()
    start = time.perf_counter()
    weights: dict[str, Any] = {linear.name: linear.weight for linear in model.linears}
    if scheme.weights is not None:
        weights = {k: lb.quantize(w, scheme.weights).prepare() for k, w in weights.items()}
    seconds = time.perf_counter() - start

    def build(linear: bert.Linear) -> bert.Layer:
        if scheme.weights is None:
            return dense_layer(clock, linear)
        return lowbit_layer(clock, scheme, weights[linear.name], linear)

    encoder = bert.Encoder(model, build)
    embeddings, batch_32 = embed(encoder, clock, tokens, BATCH, step)
    _, batch_1 = embed(encoder, clock, alone(tokens), 1, step)
    size = sum(w.nbytes for w in weights.values())
    return embeddings, Result(
        label=scheme.label,
        weights=scheme.weights or "float32",
        activations=scheme.activations or "float32",
        linear_bytes=size,
        model_bytes=size + model.other_bytes,
        **agreement(embeddings, embeddings if baseline is None else baseline),
        quantize_seconds=seconds,
        batch_1=batch_1,
        batch_32=batch_32,
    )
