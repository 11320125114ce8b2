"""Builds small GGUF files in memory, valid or forged: the world that tests bring along.

`write_gguf` and the small writers below it put any bytes anywhere; `tiny_model` makes a whole model
of random weights with a working tokenizer, in milliseconds. Not here: reading. Nothing of
`sharding.gguf.reader` is used, so that a shared mistake cannot hide.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

Metadata = Mapping[str, Any]
Tensor = tuple[NDArray[Any] | bytes, Sequence[int], str]
"""A tensor's bytes, its shape in GGUF's order (columns first) and the name of its format."""

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# fmt: off
_MERGES = (
    "Ġ t", "h e", "Ġt he", "i n", "Ġ a", "r e", "o n", "e r", "Ġ s", "Ġa n", "Ġan d", "o r", "l l",
    "Ġ w", "Ġw or", "l d", "Ġwor ld", "H e", "He ll", "Hell o", "Ġ o", "Ġo f",
)
_PIECES = (
    "\u2581t", "he", "\u2581the", "in", "\u2581a", "re", "on", "er", "\u2581s", "\u2581an",
    "\u2581and", "or", "ll", "\u2581w", "\u2581wor", "ld", "\u2581world", "\u2581H", "\u2581He",
    "\u2581Hell", "\u2581Hello",
)
# fmt: on

# Where a block keeps its F16 scales, and what makes random bytes weigh about 1 with them: d, then
# the minimum's scale, which centres the unsigned quants.
_SCALES = {
    "Q2_K": ((80, 1 / 14), (82, 1.5 / 14)),
    "Q3_K": ((108, 1 / 42),),
    "Q4_K": ((0, 1 / 258), (2, 7.5 / 258)),
    "Q5_K": ((0, 1 / 527), (2, 15.5 / 527)),
    "Q6_K": ((208, 1 / 1370),),
    "IQ4_NL": ((0, 1 / 70),),
    "IQ4_XS": ((0, 1 / 1300),),
}


def write_gguf(
    metadata: Metadata, tensors: Mapping[str, Tensor], version: int = 3, alignment: int = 32
) -> bytes:
    """A GGUF file. An alignment other than 32 is written into the metadata as well."""
    keys = dict(metadata)
    if alignment != 32:
        keys["general.alignment"] = alignment
    table, data = [], b""
    for name, (values, shape, format_name) in tensors.items():
        type_id = gguf.GGMLQuantizationType[format_name]
        table.append(tensor_entry(name, shape, type_id, len(data)))
        data = padded(data + bytes(values), alignment)
    head = file_head(len(table), len(keys), version)
    pairs = (text(key) + typed_value(value) for key, value in keys.items())
    return padded(head + b"".join(pairs) + b"".join(table), alignment) + data


def file_head(tensors: int, keys: int, version: int = 3) -> bytes:
    """Magic, version and the two counts."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    """A string with its length."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor_entry(name: str, shape: Sequence[int], type_id: int, offset: int) -> bytes:
    """A row of the tensor table; dimensions may be any 64-bit numbers."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", type_id, offset)


def padded(data: bytes, alignment: int = 32) -> bytes:
    """`data` with zeros up to a multiple of `alignment`."""
    return data + b"\0" * (-len(data) % alignment)


def typed_value(value: object) -> bytes:
    """A metadata value behind its type: int as u32 (i32 if negative, u64 if large), float as f32,
    lists of strings and numpy arrays as arrays; bytes are taken as they are, to forge anything."""
    match value:
        case bytes():
            return value
        case str():
            return struct.pack("<I", 8) + text(value)
        case list():
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
        case np.ndarray():
            return struct.pack("<IIQ", 9, _number_type(value.dtype), value.size) + value.tobytes()
    number = np.asarray(value)
    if not isinstance(value, np.generic):
        number = number.astype(_python_dtype(value))
    return struct.pack("<I", _number_type(number.dtype)) + number.tobytes()


def _python_dtype(value: object) -> type[np.generic]:
    if isinstance(value, bool):
        return np.bool_
    if isinstance(value, float):
        return np.float32
    assert isinstance(value, int), f"no GGUF type for {value!r}"
    if value < 0:
        return np.int32
    return np.uint32 if value < 1 << 32 else np.uint64


def _number_type(dtype: np.dtype[Any]) -> int:
    names = {"float32": 6, "bool": 7, "float64": 12, "uint64": 10, "int64": 11}
    small = ("uint8", "int8", "uint16", "int16", "uint32", "int32")
    return (names | {name: number for number, name in enumerate(small)})[dtype.name]


class TinyModel(msgspec.Struct, forbid_unknown_fields=True):
    """Options of `tiny_model`. `hidden` and `ffn` are multiples of 32, of 256 for K formats.

    `family`: the architecture, with whatever else its blocks have. `head_dim`: hidden / heads by
    default. `vocab`: entries, filled up with unused tokens; as few as the tokenizer needs by
    default. `quant`: format of all matrices but the embedding, which is Q8_0 beside quantised ones.
    `longrope`: factors for long and for short contexts. `experts`: feed-forwards are mixtures of so
    many of width `ffn`, of which a token takes `experts_used`. `tied`: no `output.weight`.
    `chat_template`: None for none. `extra_metadata`: keys to add or replace, or to drop where the
    value is None.
    """

    family: str = "llama"
    layers: int = 4
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    ffn: int = 96
    experts: int = 0
    experts_used: int = 2
    vocab: int | None = None
    context: int = 256
    quant: str = "Q4_1"
    seed: int = 0
    tied: bool = True
    rope_freqs: bool = False
    longrope: bool = False
    chat_template: str | None = CHATML
    tokenizer: Literal["bpe", "spm"] = "bpe"
    extra_metadata: dict[str, Any] | None = None


def tiny_model(**options: object) -> bytes:
    """A model of random weights; `TinyModel` lists the options. The same options give the same
    bytes."""
    model = msgspec.convert(options, TinyModel)
    vocabulary = bpe_vocabulary if model.tokenizer == "bpe" else spm_vocabulary
    metadata = _metadata(model) | vocabulary(model.vocab)
    if model.chat_template is not None:
        metadata["tokenizer.chat_template"] = model.chat_template
    metadata[f"{model.family}.vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    metadata |= model.extra_metadata or {}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(kept, _tensors(model, len(metadata["tokenizer.ggml.tokens"])))


def _metadata(model: TinyModel) -> dict[str, Any]:
    head_dim = model.head_dim or model.hidden // model.heads
    sizes = {
        "block_count": model.layers,
        "context_length": model.context,
        "embedding_length": model.hidden,
        "feed_forward_length": model.ffn,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_dim,
    }
    if model.experts:
        sizes |= {"expert_count": model.experts, "expert_used_count": model.experts_used}
    if model.family in _OWN_EXPERT_WIDTH:  # the other one is of layers that have no experts
        sizes |= {"expert_feed_forward_length": model.ffn, "feed_forward_length": 3 * model.ffn}
    if model.head_dim is not None:
        sizes["attention.key_length"] = sizes["attention.value_length"] = head_dim
    return {
        "general.architecture": model.family,
        "general.type": "model",
        "general.name": "Tiny model",  # llama.cpp goes by the names of some families
        "general.languages": ["en"],
        "general.quantization_version": 2,
        "general.file_type": 1024,  # llama.cpp's number for "not said"
    } | {f"{model.family}.{key}": value for key, value in sizes.items()}


_FUSED = ("phi3",)
_QKV_BIAS = ("qwen2",)
_HEAD_NORMS = ("qwen3", "qwen3moe", "gemma3")
_OWN_EXPERT_WIDTH = ("qwen3moe",)
_POST_NORMS = ("gemma3",)


def _tensors(model: TinyModel, vocab: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(model.seed)
    embedding_format = model.quant if model.quant in ("F32", "F16", "BF16") else "Q8_0"
    tensors = {
        "token_embd.weight": random_weight(rng, (model.hidden, vocab), embedding_format),
        "output_norm.weight": _vector(rng, (model.hidden,)),
    }
    tensors |= _rope_factors(model)
    if not model.tied:
        tensors["output.weight"] = random_weight(rng, (model.hidden, vocab), model.quant)
    norms, matrices = _layer_norms(model), _layer_matrices(model)
    for layer in range(model.layers):
        for name, vector in norms.items():
            tensors[f"blk.{layer}.{name}.weight"] = _vector(rng, vector)
        for name, shape in matrices.items():
            quant = "F32" if name == ROUTER else model.quant
            tensors[f"blk.{layer}.{name}.weight"] = random_weight(rng, shape, quant)
            if model.family in _QKV_BIAS and name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{name}.bias"] = _vector(rng, shape[1:], around=0.0)
    return tensors


def _head_dim(model: TinyModel) -> int:
    return model.head_dim or model.hidden // model.heads


ROUTER = "ffn_gate_inp"


def _layer_matrices(model: TinyModel) -> dict[str, tuple[int, ...]]:
    hidden, ffn = model.hidden, model.ffn
    queries, keys = (_head_dim(model) * heads for heads in (model.heads, model.kv_heads))
    if model.family in _FUSED:
        return {
            "attn_qkv": (hidden, queries + 2 * keys),
            "attn_output": (queries, hidden),
            "ffn_up": (hidden, 2 * ffn),
            "ffn_down": (ffn, hidden),
        }
    dense = {"ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn), "ffn_down": (ffn, hidden)}
    return {
        "attn_q": (hidden, queries),
        "attn_k": (hidden, keys),
        "attn_v": (hidden, keys),
        "attn_output": (queries, hidden),
        **(_experts(model) if model.experts else dense),
    }


def _experts(model: TinyModel) -> dict[str, tuple[int, ...]]:
    hidden, ffn, experts = model.hidden, model.ffn, model.experts
    return {
        ROUTER: (hidden, experts),
        "ffn_gate_exps": (hidden, ffn, experts),
        "ffn_up_exps": (hidden, ffn, experts),
        "ffn_down_exps": (ffn, hidden, experts),
    }


def _layer_norms(model: TinyModel) -> dict[str, tuple[int]]:
    norm, head = (model.hidden,), (_head_dim(model),)
    norms = {"attn_norm": norm, "ffn_norm": norm}
    if model.family in _POST_NORMS:
        norms |= {"post_attention_norm": norm, "post_ffw_norm": norm}
    if model.family in _HEAD_NORMS:
        norms |= {"attn_q_norm": head, "attn_k_norm": head}
    return norms


def _rope_factors(model: TinyModel) -> dict[str, Tensor]:
    most = {"rope_freqs": 8} if model.rope_freqs else {}
    if model.longrope:
        most |= {"rope_factors_long": 16, "rope_factors_short": 2}
    pairs = _head_dim(model) // 2
    return {
        f"{name}.weight": (np.linspace(1, last, pairs, dtype=np.float32), (pairs,), "F32")
        for name, last in most.items()
    }


def _vector(rng: np.random.Generator, shape: tuple[int, ...], around: float = 1.0) -> Tensor:
    return rng.normal(around, 0.1, shape).astype(np.float32), shape, "F32"


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], format_name: str) -> Tensor:
    """Matrices that keep the size of what they multiply: deviation 1 / sqrt(columns)."""
    cols, rows = shape[0], math.prod(shape[1:])
    kind = gguf.GGMLQuantizationType[format_name]
    if format_name not in _SCALES:
        values = rng.standard_normal((rows, cols), np.float32) / np.float32(np.sqrt(cols))
        return gguf.quants.quantize(values, kind), shape, format_name
    # The gguf package cannot quantise to these, so their bytes are drawn directly.
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert cols % block_elements == 0, f"{cols} columns in {format_name}"
    blocks = rng.integers(0, 256, (rows * cols // block_elements, block_bytes), np.uint8)
    for offset, factor in _SCALES[format_name]:
        scales = factor * rng.uniform(0.8, 1.2, (len(blocks), 1)) / np.sqrt(cols)
        blocks[:, offset : offset + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks, shape, format_name


def bpe_vocabulary(vocab: int | None = None) -> dict[str, Any]:
    """SmolLM2's kind of tokenizer: 3 control tokens, the 256 bytes, and what the merges make."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merged = [merge.replace(" ", "") for merge in _MERGES]
    tokens, kinds = _filled([(control, 3), (byte_alphabet(), 1), (merged, 1)], vocab)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(_MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }


def spm_vocabulary(vocab: int | None = None) -> dict[str, Any]:
    """Llama 2's kind of tokenizer: unknown, begin, end, 256 byte tokens, pieces by falling score,
    then single characters, which lose against every longer piece."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*_PIECES, "\u2581", *letters]
    tokens, kinds = _filled(
        [
            (["<unk>"], 2),
            (["<s>", "</s>"], 3),
            ([f"<0x{byte:02X}>" for byte in range(256)], 6),
            (pieces, 1),
        ],
        vocab,
    )
    scores = np.zeros(len(tokens), np.float32)
    scores[259:] = -np.arange(len(tokens) - 259)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }


def _filled(
    runs: Iterable[tuple[list[str], int]], vocab: int | None
) -> tuple[list[str], NDArray[np.int32]]:
    """Tokens and their types, filled up to `vocab` entries with unused ones (type 5)."""
    runs = list(runs)
    missing = 0 if vocab is None else vocab - sum(len(tokens) for tokens, _ in runs)
    assert missing >= 0, f"a vocabulary of {vocab} is too small for the tokenizer by {-missing}"
    runs.append(([f"[UNUSED{number}]" for number in range(missing)], 5))
    tokens = [token for run, _ in runs for token in run]
    return tokens, np.repeat([kind for _, kind in runs], [len(run) for run, _ in runs]).astype(
        np.int32
    )


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: itself where it is printable and no space, else the next
    free one from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    strange = iter(range(256, 512))
    return [chr(byte if byte in plain else next(strange)) for byte in range(256)]
