"""How fast a model's heads turn: what GGUF metadata or a user say of rotary embedding.

Not here: angles (`rope.py`). No torch, so that a plan can check a file at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharding.errors import ConfigError, CorruptFileError, UnsupportedModelError
from sharding.model.keys import MOST_CONTEXT, KeyReader, Metadata


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., 2023): a model trained on `context` tokens is stretched by dividing the
    positions of slow pairs alone, those that turn less than `slow` times within it; between them
    and those that turn more than `fast` times, by parts."""

    context: int
    fast: float = 32.0
    slow: float = 1.0


@dataclass(frozen=True)
class Rotation:
    """How fast pairs turn: `base` to the power of minus their share of the head; positions are
    divided by `scale`, all pairs' or as `yarn` says. Cosines and sines are times `gain`.

    `longrope`: the file must have factors for each pair (LongRoPE, Ding et al., 2024), which it may
    in any case: some for contexts of up to `trained` tokens, others for longer ones.
    """

    base: float
    scale: float = 1.0
    yarn: Yarn | None = None
    gain: float = 1.0
    longrope: bool = False
    trained: int = 0


ROPE_SCALINGS = ("none", "linear", "yarn")
LONGROPE = "longrope"  # only a file can ask for it: it has the factors


@dataclass(frozen=True)
class Stretch:
    """Rotary scaling that a user wants in place of the file's: a model trained on `trained` tokens
    (None for those that the file says) reads `factor` times as many. `scaling` is one of
    `ROPE_SCALINGS`."""

    scaling: str
    factor: float = 1.0
    trained: int | None = None

    def onto(self, metadata: Metadata, prefix: str) -> Metadata:
        """The metadata, as if the file had asked for it."""
        original = f"{prefix}.rope.scaling.original_context_length"
        trained = (
            self.trained or metadata.get(original) or _unstretched(KeyReader(metadata, prefix))
        )
        changed = dict(metadata)
        changed.pop(f"{prefix}.rope.scale_linear", None)
        changed[f"{prefix}.rope.scaling.type"] = self.scaling
        changed[f"{prefix}.rope.scaling.factor"] = self.factor
        if isinstance(trained, int):  # else the file is broken, and is told so
            context = int(trained * self.factor)
            if context > MOST_CONTEXT:
                raise ConfigError(
                    f"{self.factor:g} times {trained} tokens are beyond any context; lower "
                    "rope_scale or yarn_orig_ctx"
                )
            changed[original], changed[f"{prefix}.context_length"] = trained, context
        return changed


def read_rotations(read: KeyReader, two: bool) -> tuple[Rotation, ...]:
    """One for all layers; if there are `two`, the second is that of layers with a window, which no
    scaling is of: they see nothing far away.

    Older files of Gemma 3 call the bases `rope.global.freq_base` and `rope.local.freq_base`. Raises
    `CorruptFileError` and `UnsupportedModelError`.
    """
    scale, yarn = _scaling(read)
    gain = read.real("rope.scaling.attn_factor", 1.0)
    former = read.real("rope.global.freq_base", 10000.0) if two else 10000.0
    base = read.real("rope.freq_base", former)
    if yarn and base <= 1:
        raise CorruptFileError(f"{read.prefix}.rope.freq_base of {base:g} under YaRN")
    longrope = read.metadata.get(_kind(read)) == LONGROPE
    rotation = Rotation(base, scale, yarn, gain, longrope, _trained(read))
    if not two:
        return (rotation,)
    own = read.real("rope.freq_base_swa", read.real("rope.local.freq_base", 10000.0))
    return rotation, Rotation(own)


def _scaling(read: KeyReader) -> tuple[float, Yarn | None]:
    """What positions are divided by, 1 where the file asks for no scaling.

    A factor without a type is a linear one, and older files call it `rope.scale_linear`. One of 0
    stands for none.
    """
    kind = read.metadata.get(_kind(read), "linear")
    if kind in ("none", LONGROPE):
        return 1.0, None
    if kind not in ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"rotary scaling of type {kind!r:.60} is not supported; supported: "
            f"{', '.join((*ROPE_SCALINGS, LONGROPE))}"
        )
    scale = _factor(read)
    if kind == "linear":
        return scale, None
    trained = _trained(read)
    turns = [read.real(f"rope.scaling.yarn_beta_{name}", usual) for name, usual in _TURNS.items()]
    if max(turns) > MOST_CONTEXT:
        raise CorruptFileError(f"{read.prefix}.rope.scaling: pairs that turn {max(turns):g} times")
    return scale, Yarn(trained, *turns)


def _trained(read: KeyReader) -> int:
    """The context that a model was trained for before it learned a longer one."""
    return read.whole("rope.scaling.original_context_length", read.whole("context_length"))


def _kind(read: KeyReader) -> str:
    return f"{read.prefix}.rope.scaling.type"


_TURNS = {"fast": 32.0, "slow": 1.0}


def _factor(read: KeyReader) -> float:
    """That the file asks for, 1 if for none."""
    keys = ("rope.scaling.factor", "rope.scale_linear")
    given = [key for key in keys if read.metadata.get(f"{read.prefix}.{key}", 0) != 0]
    return read.real(given[0]) if given else 1.0


def _unstretched(read: KeyReader) -> int:
    """The context before the file's own scaling: that is contained in what it says."""
    stretched = read.metadata.get(_kind(read), "linear") != "none"
    context = read.whole("context_length")
    return max(1, int(context / _factor(read))) if stretched else context
