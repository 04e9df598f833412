"""A BERT encoder in NumPy: read a checkpoint folder, tokenize, embed. No framework.

Every linear layer goes through one callable that the caller builds, so the same encoder runs
dense or quantized; it computes in the dtype asked for (float32, or float64 for checking).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Array = npt.NDArray[Any]
Layer = Callable[[Array], Array]

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
HEADER_LIMIT = 32 * 2**20  # bytes; real headers have kilobytes


class CheckpointError(ValueError):
    """The folder is not a checkpoint that this encoder can run; the message says why."""


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias, then erf gelu where `activation` says so."""

    name: str
    weight: Array  # [out, in]
    bias: Array
    activation: str | None = None


@dataclass(frozen=True)
class Norm:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, over the last axis."""

    weight: Array
    bias: Array
    epsilon: float

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        unit: Array = centred / np.sqrt(variance + self.epsilon)
        unit *= self.weight.astype(x.dtype)
        unit += self.bias.astype(x.dtype)
        return unit


@dataclass(frozen=True)
class Block:
    """One transformer layer: attention and a two-layer network, each followed by its norm."""

    query: Linear
    key: Linear
    value: Linear
    attention_output: Linear
    attention_norm: Norm
    intermediate: Linear
    output: Linear
    output_norm: Norm

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (
            *(self.query, self.key, self.value, self.attention_output),
            *(self.intermediate, self.output),
        )


@dataclass(frozen=True)
class Model:
    """What a checkpoint folder holds, float32; the pooler is not read."""

    words: Array  # [vocabulary, hidden]
    positions: Array
    types: Array
    norm: Norm
    blocks: tuple[Block, ...]
    heads: int
    pooling: str  # "mean" or "cls"
    pad_id: int
    tokenizer: Tokenizer

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def other_bytes(self) -> int:
        """Everything but the weights of the linear layers."""
        norms = [n for b in self.blocks for n in (b.attention_norm, b.output_norm)]
        arrays = [self.words, self.positions, self.types, *(x.bias for x in self.linears)]
        return sum(a.nbytes for a in arrays) + sum(
            n.weight.nbytes + n.bias.nbytes for n in (self.norm, *norms)
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no {path.name}; a checkpoint folder has config.json, "
            "model.safetensors and tokenizer.json"
        )
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: an object was expected, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every floating tensor of the file, as float32; other dtypes are passed over."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name}; shards and pickles are not read")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(HEADER_LIMIT, len(data) - 8):
        raise CheckpointError(f"{path}: header of {length} bytes in a file of {len(data)}")
    body = memoryview(data)[8 + length :]
    entries: list[tuple[int, int, str, str, list[int]]] = []
    try:
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = map(int, entry["data_offsets"])
                shape = [int(n) for n in entry["shape"]]
                entries.append((start, stop, name, str(entry["dtype"]), shape))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: header is not what safetensors writes: {error}") from None
    tensors, end = {}, 0
    for start, stop, name, kind, shape in sorted(entries):
        if start != end or not start <= stop <= len(body) or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{path}: {name} {shape} stands at {start}..{stop} of {len(body)} bytes; what "
                f"comes before it ends at {end}"
            )
        end = stop
        if kind not in DTYPES:
            continue
        if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
            raise CheckpointError(f"{path}: {name} has {stop - start} bytes for {kind} {shape}")
        tensors[name] = np.frombuffer(body[start:stop], DTYPES[kind]).reshape(shape)
    if end != len(body):
        raise CheckpointError(f"{path}: {len(body) - end} bytes belong to no tensor")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def _refuse_other_models(folder: Path, config: Mapping[str, Any]) -> None:
    for key, wanted, default in (
        ("model_type", "bert", None),
        ("hidden_act", "gelu", "gelu"),
        ("position_embedding_type", "absolute", "absolute"),
        ("is_decoder", False, False),
    ):
        if config.get(key, default) != wanted:
            raise CheckpointError(
                f"{folder}: {key} is {config.get(key)!r}; this encoder is written for {wanted!r}"
            )


def _pooling(folder: Path) -> str:
    """How sentence-transformers was told to pool; the mean where it says nothing."""
    path = folder / "1_Pooling" / "config.json"
    modes = [k for k, v in _json(path).items() if k.startswith("pooling_mode_") and v is True]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise CheckpointError(f"{path}: pooling by {modes}; this script knows {sorted(names)}")
    return names[modes[0]]


def load(folder: Path) -> Model:
    """Read config.json, model.safetensors and tokenizer.json, and check that they agree."""
    config = _json(folder / "config.json")
    _refuse_other_models(folder, config)
    keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "vocab_size", "type_vocab_size"),
    )
    if wrong := [k for k in keys if not isinstance(config.get(k), int) or config[k] < 1]:
        raise CheckpointError(f"{folder / 'config.json'}: no positive number for {wrong}")
    hidden, layers, heads, wide, longest, vocabulary, types = (config[k] for k in keys)
    if hidden % heads:
        raise CheckpointError(f"{folder}: hidden_size {hidden} is no multiple of {heads} heads")
    path = folder / "model.safetensors"
    tensors = read_safetensors(path)
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""

    def take(name: str, *shape: int) -> Array:
        if (array := tensors.get(prefix + name)) is None:
            raise CheckpointError(f"{path}: no floating tensor {prefix + name}")
        if array.shape != shape:
            raise CheckpointError(f"{path}: {name} is {array.shape}, config.json says {shape}")
        return array

    def linear(name: str, rows: int, columns: int, activation: str | None = None) -> Linear:
        weight, bias = take(f"{name}.weight", rows, columns), take(f"{name}.bias", rows)
        return Linear(name, weight, bias, activation)

    def norm(name: str) -> Norm:
        epsilon = float(config.get("layer_norm_eps", 1e-12))
        return Norm(take(f"{name}.weight", hidden), take(f"{name}.bias", hidden), epsilon)

    def block(at: str) -> Block:
        return Block(
            query=linear(f"{at}.attention.self.query", hidden, hidden),
            key=linear(f"{at}.attention.self.key", hidden, hidden),
            value=linear(f"{at}.attention.self.value", hidden, hidden),
            attention_output=linear(f"{at}.attention.output.dense", hidden, hidden),
            attention_norm=norm(f"{at}.attention.output.LayerNorm"),
            intermediate=linear(f"{at}.intermediate.dense", wide, hidden, "gelu"),
            output=linear(f"{at}.output.dense", hidden, wide),
            output_norm=norm(f"{at}.output.LayerNorm"),
        )

    return Model(
        words=take("embeddings.word_embeddings.weight", vocabulary, hidden),
        positions=take("embeddings.position_embeddings.weight", longest, hidden),
        types=take("embeddings.token_type_embeddings.weight", types, hidden),
        norm=norm("embeddings.LayerNorm"),
        blocks=tuple(block(f"encoder.layer.{n}") for n in range(layers)),
        heads=heads,
        pooling=_pooling(folder) if (folder / "1_Pooling").is_dir() else "mean",
        pad_id=int(config.get("pad_token_id", 0)),
        tokenizer=_tokenizer(folder, longest, vocabulary),
    )


def _tokenizer(folder: Path, longest: int, vocabulary: int) -> Tokenizer:
    """tokenizer.json, cut at the length that the folder names, without padding."""
    path = folder / "tokenizer.json"
    _json(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{path}: {error}") from None
    if (size := tokenizer.get_vocab_size()) > vocabulary:
        raise CheckpointError(f"{path}: {size} tokens, config.json has {vocabulary}")
    told = folder / "sentence_bert_config.json"
    limit = _json(told).get("max_seq_length") if told.is_file() else None
    tokenizer.enable_truncation(min(longest, limit or longest))
    tokenizer.no_padding()
    return tokenizer


def tokenize(model: Model, sentences: Sequence[str]) -> list[list[int]]:
    """Token numbers of each sentence, with [CLS] and [SEP]."""
    return [encoding.ids for encoding in model.tokenizer.encode_batch(list(sentences))]


def batches(
    tokens: Sequence[Sequence[int]], size: int, pad_id: int
) -> Iterator[tuple[list[int], Array, Array]]:
    """(which sentences, token numbers, mask) of `size` sentences at a time, of like length."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids = np.full((len(chosen), max(len(tokens[i]) for i in chosen)), pad_id, np.int64)
        mask = np.zeros(ids.shape, np.bool_)
        for row, i in enumerate(chosen):
            ids[row, : len(tokens[i])] = tokens[i]
            mask[row, : len(tokens[i])] = True
        yield chosen, ids, mask


class Encoder:
    """Sentence embeddings of length 1; `build` makes each linear layer what it shall be."""

    def __init__(
        self, model: Model, build: Callable[[Linear], Layer], dtype: npt.DTypeLike = np.float32
    ) -> None:
        self.model = model
        self.dtype = np.dtype(dtype)
        self.layers = {linear.name: build(linear) for linear in model.linears}

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embeddings of a batch of token numbers [sentence, token]; `mask` is False at padding."""
        model = self.model
        x = model.words[ids].astype(self.dtype)
        x += model.positions[: ids.shape[1]]
        x += model.types[0]
        x = model.norm(x)
        for block in model.blocks:
            x = block.attention_norm(x + self._attend(block, x, mask))
            inner = self.layers[block.intermediate.name](x)
            x = block.output_norm(x + self.layers[block.output.name](inner))
        if model.pooling == "cls":
            pooled: Array = x[:, 0]
        else:
            pooled = (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, dtype=x.dtype)[:, None]
        pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
        return pooled

    def _attend(self, block: Block, x: Array, mask: Array) -> Array:
        sentences, tokens, hidden = x.shape
        heads = (sentences, tokens, self.model.heads, hidden // self.model.heads)
        q, k, v = (
            self.layers[linear.name](x).reshape(heads).transpose(0, 2, 1, 3)
            for linear in (block.query, block.key, block.value)
        )
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(heads[-1])
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ v).transpose(0, 2, 1, 3).reshape(sentences, tokens, hidden)
        return self.layers[block.attention_output.name](mixed)


def dense(linear: Linear, dtype: npt.DTypeLike = np.float32) -> Layer:
    """The layer in NumPy: BLAS, bias, and gelu from the erf that suits the dtype."""
    weight, bias = linear.weight.astype(dtype).T, linear.bias.astype(dtype)

    def run(x: Array) -> Array:
        y = x @ weight
        y += bias
        return gelu(y) if linear.activation == "gelu" else y

    return run


def gelu(x: Array) -> Array:
    """x * (1 + erf(x / sqrt 2)) / 2, in place: exact in float64, `erf_fast` below that."""
    if x.dtype == np.float64:
        erf = [math.erf(v) for v in (x / math.sqrt(2)).ravel().tolist()]
        x *= 0.5 + 0.5 * np.array(erf).reshape(x.shape)
        return x
    for part in np.array_split(x.reshape(-1), x.size // 32768 + 1):  # parts stay in the L2 cache
        part *= 0.5 + 0.5 * erf_fast(part / math.sqrt(2))
    return x


# Numerator (times x) and denominator in x**2, highest power first: the rational that Eigen and
# XLA use below |x| = 4, |error| < 6.5e-8.
ERF_NUMERATOR = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
ERF_DENOMINATOR = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)


def erf_fast(x: Array) -> Array:
    """erf with an absolute error below 6.5e-8 (about float32's rounding of 1), as float64."""
    x = np.clip(x, -4, 4, dtype=np.float64)
    square = x * x

    def horner(coefficients: tuple[float, ...]) -> Array:
        total = np.full_like(square, coefficients[0])
        for c in coefficients[1:]:
            total *= square
            total += c
        return total

    return x * horner(ERF_NUMERATOR) / horner(ERF_DENOMINATOR)
