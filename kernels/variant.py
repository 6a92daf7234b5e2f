"""How a Triton kernel is launched, as data, so that a machine without a GPU can compile it and check its machine code."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One compilation of a Triton kernel; `variants()` of every kernels/<op>/triton.py lists those of typical shapes.

    name: its row in a table, such as "token_stats bf16".
    kernel: the `@triton.jit` function.
    signature: type of every run-time argument by its name, in Triton's notation ("*bf16", "i64", "fp32"); a type that ends in
        ":16" promises a pointer or integer divisible by 16, which the launch infers and the width of a load depends on.
    constexprs: value of every other argument by its name.
    num_warps, num_stages: of the launch.
    elements: input elements that a thread block handles in one turn of its main loop; 0 where no budget per element applies.
    budget: SASS instructions that a thread may spend on one of its elements in that loop; 0 for no budget. Instructions are
        counted per thread: length of the loop · 32 num_warps / elements.
    architectures: compute capabilities on which it is launched with these constants.
    maxnreg: limit on registers per thread; None leaves it to ptxas.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    elements: int = 0
    budget: float = 0.0
    architectures: tuple[int, ...] = (80, 90)
    maxnreg: int | None = None
