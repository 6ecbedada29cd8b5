"""Products with packed weights: x · Wᵀ and x · W, of one matrix or of many experts, without expanding W in memory.

On a GPU few tokens are multiplied row by row, some in tiles that decode the weights as they go, more of them panel by
panel: decoding a panel costs little beside so many products, and torch's own product is the fastest there is. How many
are few and some, and how large tiles are, settings.py says. On the CPU host.py does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.errors import FormatError
from quantkit.formats.layout import Integers, Linear
from quantkit.kernels import host
from quantkit.kernels.dequantize import embedding
from quantkit.kernels.devices import is_roomy, launch, multiplies_tiles, on_host
from quantkit.kernels.packing import Packing, check_low_rank, check_product, file_bytes
from quantkit.kernels.settings import settings_of

if TYPE_CHECKING:
    import torch

DEPTH = 64  # the least weights of a row for one dot
PANEL = 1 << 25  # weights of a panel: 64 MiB in bfloat16


def matmul(
    x: torch.Tensor, data: torch.Tensor, packing: Packing, low: torch.Tensor | None = None, up: torch.Tensor | None = None
) -> torch.Tensor:
    """x · Wᵀ [+ low · upᵀ]: (..., columns) times packed rows, uint8 (rows, bytes) → (..., rows) in the type of x.

    low, up: (..., rank) and (rows, rank), a low-rank addition whose inputs are multiplied already. Sums in float32.
    Raises FormatError if x and the rows do not fit each other.
    """
    check_product(x, data, packing)
    check_low_rank(x, data, low, up)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    thin = low.reshape(-1, low.shape[-1]).contiguous() if low is not None else None
    if on_host(data):
        out = host.matmul(flat.float(), file_bytes(data, packing), packing.format).to(x.dtype)
    elif 0 < len(flat) <= settings_of(data).few:
        return _matvec(flat, data, packing, thin, up).reshape(*x.shape[:-1], len(data))
    elif len(flat) <= settings_of(data).some and multiplies_tiles(x):
        return _tiles(flat, data, packing, None, thin, up).reshape(*x.shape[:-1], len(data))
    else:
        out = _panels(flat, data, packing, transposed=False)
    if thin is not None and up is not None:
        out = out + thin @ up.T
    return out.reshape(*x.shape[:-1], len(data))


def matmul_transposed(x: torch.Tensor, data: torch.Tensor, packing: Packing) -> torch.Tensor:
    """x · W: (..., rows) times packed rows, uint8 (rows, bytes) → (..., columns) in the type of x; the gradient of ``matmul``."""
    check_product(x, data, packing, transposed=True)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if on_host(data):
        out = host.matmul_transposed(flat.float(), file_bytes(data, packing), packing.format).to(x.dtype)
    elif len(flat) <= settings_of(data).some and multiplies_tiles(x):
        out = _transposed_tiles(flat, data, packing, None)
    else:
        out = _panels(flat, data, packing, transposed=True)
    return out.reshape(*x.shape[:-1], packing.columns(data))


def grouped(x: torch.Tensor, data: torch.Tensor, packing: Packing, ends: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Every token times the matrix of its expert: (tokens, columns), sorted by expert → (tokens, rows); transposed: the reverse.

    data: uint8 (experts, rows, bytes). ends: int32 (experts,), where the tokens of each expert end; the last one is the
    number of tokens. Raises FormatError.
    """
    check_product(x, data, packing, transposed, axes=3)
    _check_ends(x, data, ends)
    x = x.contiguous()
    if not on_host(data) and multiplies_tiles(x):
        return _transposed_tiles(x, data, packing, ends) if transposed else _tiles(x, data, packing, ends)
    out, first = x.new_empty(len(x), packing.columns(data) if transposed else data.shape[1]), 0
    raw = file_bytes(data, packing) if on_host(data) else data
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            out[first:end] = _one_expert(x[first:end], raw, expert, packing, transposed)
        first = end
    return out


def _one_expert(x: torch.Tensor, data: torch.Tensor, expert: int, packing: Packing, transposed: bool) -> torch.Tensor:
    """The product of one expert's tokens, where no program does all experts at once. data: on the CPU as in the file."""
    import torch

    if on_host(data):
        product = host.matmul_transposed if transposed else host.matmul
        return product(x.float(), data[expert], packing.format).to(x.dtype)
    rows = torch.arange(data.shape[1], device=data.device) + expert * data.shape[1]
    weight = embedding(rows, data.reshape(-1, data.shape[2]), packing, x.dtype)
    return x @ weight if transposed else x @ weight.T


def swiglu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, packings: tuple[Packing, Packing], ends: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x · gateᵀ) ∘ (x · upᵀ): (..., columns) → (..., rows); of experts with ``ends``, see ``grouped``."""
    for data, packing in zip((gate, up), packings, strict=True):
        check_product(x, data, packing, axes=2 if ends is None else 3)
        if ends is not None:
            _check_ends(x, data, ends)
    if gate.shape[:-1] != up.shape[:-1]:
        raise FormatError(f"gate and up have {gate.shape[-2]} and {up.shape[-2]} rows", hint="they must be of one layer")
    shape, x, sizes = x.shape, x.reshape(-1, x.shape[-1]).contiguous(), settings_of(gate)
    if on_host(gate) or not multiplies_tiles(x) or (ends is None and not sizes.few < len(x) <= sizes.some):
        import torch

        both = [
            matmul(x, data, packing) if ends is None else grouped(x, data, packing, ends)
            for data, packing in zip((gate, up), packings, strict=True)
        ]
        return (torch.nn.functional.silu(both[0]) * both[1]).reshape(*shape[:-1], gate.shape[-2])
    return _swiglu_tiles(x, gate, up, packings, ends).reshape(*shape[:-1], gate.shape[-2])


def _check_ends(x: torch.Tensor, data: torch.Tensor, ends: torch.Tensor) -> None:
    import torch

    whole = ends.dtype in (torch.int32, torch.int64)
    if not whole or x.ndim != 2 or ends.shape != (len(data),) or ends.device != x.device:
        raise FormatError(
            f"inputs {tuple(x.shape)} with ends {tuple(ends.shape)} ({ends.dtype}) on {ends.device} do not fit experts {tuple(data.shape)}",
            hint="give (tokens, columns), (experts, rows, bytes) and one end for each expert in integers, on one device",
        )


# -- Triton ---------------------------------------------------------------------------------------


def _low_rank(x: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None, least: int) -> dict[str, Any]:
    """What a program needs of a low-rank addition; something with an address where there is none. least: of RANK."""
    if low is None or up is None:
        return {"low": x, "up": x, "rank": 0, "RANK": 0}
    rank = low.shape[1]
    return {"low": low, "up": up.contiguous(), "rank": rank, "RANK": max(least, 1 << (rank - 1).bit_length())}


def _matvec(
    x: torch.Tensor, data: torch.Tensor, packing: Packing, low: torch.Tensor | None = None, up: torch.Tensor | None = None
) -> torch.Tensor:
    """Few tokens."""
    given = packing.arguments(data)
    from quantkit.kernels.programs_product import matvec

    made, sizes = packing.decoder(), settings_of(data)
    runs, length = made.shape or (0, 0)
    out = x.new_empty(len(x), len(data))
    launch(
        matvec, (-(-len(data) // sizes.row_outputs), len(x)), data, x=x, out=out, rows=len(data),
        WHERE=made.where, RUNS=runs, LENGTH=length, ROWS=sizes.row_outputs,
        TOGETHER=max(1, sizes.row_weights // packing.format.elements), maxnreg=255, enable_fp_fusion=True,
        **_low_rank(x, low, up, 1), **given,
    )  # fmt: skip
    return out


def _geometry(packing: Packing, suffix: str = "") -> dict[str, Any]:
    """How a tile's blocks are taken apart: TOGETHER is a power of two that gives every dot enough depth."""
    made = packing.decoder()
    together = 1
    while together * min(made.sizes) < 16 or together * made.largest < DEPTH:
        together *= 2
    found = {"PLACE": made.place, "TOGETHER": together}
    return {f"{name}{suffix}": value for name, value in found.items()}


def _is_small(data: torch.Tensor, *packings: Packing) -> bool:
    """Whether tiles must be small: on GPUs with less memory than an H100, and for tables, code books and digits."""
    easy = all(isinstance(p.format.values, Linear) and isinstance(p.format.codes, Integers) for p in packings)
    return not (easy and is_roomy(data))


def _tile(x: torch.Tensor, ends: torch.Tensor | None, data: torch.Tensor, *packings: Packing) -> dict[str, Any]:
    """Rows and tokens of a tile, and options of the program; few tokens an expert where there are many experts."""
    sizes, small = settings_of(data), _is_small(data, *packings)
    each = len(x) if ends is None else -(-len(x) // len(ends))
    tokens = next((size for size in (16, 32) if each <= size), 32 if small else 64)
    found = {"ROWS": sizes.narrow if small else sizes.rows, "TOKENS": tokens, "num_warps": sizes.warps, "enable_fp_fusion": True}
    # Where tiles must be small, the compiler would rather spill registers than use them all.
    return found | ({"maxnreg": 255, "num_stages": 2} if small else {})


def _tokens(x: torch.Tensor, ends: torch.Tensor | None, tile: int) -> tuple[int, dict[str, Any]]:
    """(tiles of ``tile`` tokens that cover all, whoever's they are; what a program needs to find its own)."""
    if ends is None:
        return -(-len(x) // tile), {"slots": x, "ends": x, "tokens": len(x), "GROUPED": False}
    count = -(-len(x) // tile) + len(ends)
    return count, {"slots": _slots(len(x), ends, tile, count), "ends": ends, "tokens": len(x), "GROUPED": True}


def _slots(tokens: int, ends: torch.Tensor, tile: int, count: int) -> torch.Tensor:
    """int32 (count, 2): expert and first token of each tile, on the device; past the last one a token past the end."""
    import torch

    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    tiles = torch.cumsum((counts + tile - 1) // tile, 0)
    slot = torch.arange(count, device=ends.device)
    expert = torch.searchsorted(tiles, slot, right=True).clamp(max=len(ends) - 1)
    before = torch.where(expert > 0, tiles[expert - 1], 0)
    first = ends[expert] - counts[expert] + (slot - before) * tile
    return torch.stack([expert, first.clamp(max=tokens)], 1).int()


def _tiles(
    x: torch.Tensor, data: torch.Tensor, packing: Packing, ends: torch.Tensor | None, low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Tiles of x · Wᵀ."""
    given = packing.arguments(data)
    from quantkit.kernels.programs_product import matmul as program

    rows, tile = data.shape[-2], _tile(x, ends, data, packing)
    out = x.new_empty(len(x), rows)
    if len(x):
        count, found = _tokens(x, ends, tile["TOKENS"])
        launch(
            program, (-(-rows // tile["ROWS"]), count), x, x=x, out=out, rows=rows, **_low_rank(x, low, up, 16),
            **tile, **found, **given, **_geometry(packing),
        )  # fmt: skip
    return out


def _swiglu_tiles(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, packings: tuple[Packing, Packing], ends: torch.Tensor | None
) -> torch.Tensor:
    """Tiles of both products and what is made of them."""
    given = {**packings[0].arguments(gate, "_gate"), **packings[1].arguments(up, "_up")}
    from quantkit.kernels.programs_product import swiglu as program

    rows, tile = gate.shape[-2], _tile(x, ends, gate, *packings)
    out = x.new_empty(len(x), rows)
    if len(x):
        count, found = _tokens(x, ends, tile["TOKENS"])
        launch(
            program, (-(-rows // tile["ROWS"]), count), x, x=x, out=out, rows=rows, **tile, **found, **given,
            **_geometry(packings[0], "_gate"), **_geometry(packings[1], "_up"),
        )  # fmt: skip
    return out


def _transposed_tiles(x: torch.Tensor, data: torch.Tensor, packing: Packing, ends: torch.Tensor | None) -> torch.Tensor:
    """Tiles of x · W, one launch for each piece of the blocks."""
    given = packing.arguments(data)
    from quantkit.kernels.programs_product import matmul_transposed as program

    pieces, shape, tile = given.pop("PIECES"), _geometry(packing), _tile(x, ends, data, packing)
    out = x.new_empty(len(x), packing.columns(data))
    count, found = _tokens(x, ends, tile["TOKENS"])
    for piece in range(pieces if len(x) else 0):
        launch(
            program, (-(-given["blocks"] // shape["TOGETHER"]), count), x, x=x, out=out, rows=data.shape[-2], PIECE=piece,
            SIZE=packing.decoder().sizes[piece],
            **tile, **found, **given, **shape,
        )  # fmt: skip
    return out


def _panels(x: torch.Tensor, data: torch.Tensor, packing: Packing, transposed: bool) -> torch.Tensor:
    """Many tokens: torch multiplies, with panels of decoded rows. Sums over panels are float32."""
    import torch

    columns, wide = packing.columns(data), torch.float32
    step = max(1, PANEL // columns)
    out = x.new_zeros(len(x), columns, dtype=wide) if transposed else x.new_empty(len(x), len(data))
    for first in range(0, len(data), step):
        rows = torch.arange(first, min(first + step, len(data)), device=data.device)
        panel = embedding(rows, data, packing, x.dtype)
        if transposed:
            out += x[:, first : first + len(panel)] @ panel
        else:
            out[:, first : first + len(panel)] = x @ panel.T
    return out.to(x.dtype)
