"""How a product is cut: a block's tile, the stages of its pipeline, shares of the columns."""

from __future__ import annotations

from dataclasses import dataclass

_FULL = 96 * 1024  # bytes of shared memory that a block may have on every GPU from sm_80 on
_ROOMY = 48 * 1024  # with which four blocks of few rows share a multiprocessor


@dataclass(frozen=True)
class Tile:
    """A block's work: `rows` rows of w by `columns` rows of x, `depth` columns at a time."""

    w_tiles: int
    """16 rows of w each, of a warp."""
    x_tiles: int
    """8 rows of x each, of a warp."""
    w_warps: int
    x_warps: int
    depth: int

    @property
    def rows(self) -> int:
        """Of w."""
        return 16 * self.w_tiles * self.w_warps

    @property
    def columns(self) -> int:
        """Of the result: rows of x."""
        return 8 * self.x_tiles * self.x_warps

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.w_warps * self.x_warps


def tile_for(m: int, w_octet: int, x_octet: int) -> Tile:
    """The tile for m rows of x; octets are the bytes of eight numbers of either operand."""
    # Rows of odd widths fill 16-byte pieces at 128 columns; wide x leaves less room.
    depth = 128 if w_octet % 2 or x_octet % 2 or m <= 32 else 64
    if x_octet > 16:
        depth = 128 if w_octet % 2 else 64
    if m <= 8:
        return Tile(1, 1, 4, 1, depth)
    if m <= 16:
        return Tile(1, 2, 4, 1, depth)
    if m <= 32:
        return Tile(2, 4, 4, 1, depth)
    if m <= 64:
        return Tile(2, 8, 4, 1, depth)
    return Tile(2, 8, 4, 2, depth)


def row_pitch(bytes_: int, span: int) -> int:
    """Bytes between rows in shared memory; gemm.cuh has the same rule, and why."""
    pitch = -(-bytes_ // 16) * 16
    step = 16 if span < 16 or span % 16 or span >= 128 else span
    while pitch % 16 or (pitch % 128 // step) % 2 == 0 or pitch % 128 % step:
        pitch += 16
    return pitch


def stage_bytes(tile: Tile, run: int, w_octet: int, x_octet: int) -> int:
    """Shared memory of one stage of the pipeline."""
    octets = tile.depth // 8
    w = tile.rows * row_pitch(octets * w_octet, 4 * run * w_octet)
    return w + tile.columns * row_pitch(octets * x_octet, 4 * run * x_octet)


def stages_for(tile: Tile, stage: int) -> int:
    """Stages of the pipeline: as many as fit, at least two."""
    room = _ROOMY if tile.columns <= 16 else _FULL
    return max(2, min(8 if tile.columns <= 16 else 4, room // stage))


def shares_for(blocks: int, stages: int, room: int) -> int:
    """Blocks that share the columns of one tile, where the tiles are fewer than there is room for.

    No share is empty.
    """
    wanted = room // blocks
    if wanted < 2 or stages < 4:
        return 1
    each = -(-stages // min(wanted, stages // 2))
    return -(-stages // each)
