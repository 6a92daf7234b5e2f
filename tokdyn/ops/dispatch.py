"""Which form of an operator computes: the one that is asked for, or the fastest that takes these tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native


def choose(op: str, impl: str | None, tensors: Sequence[Tensor | None], *, triton: bool = True, cpp: bool | None = None) -> str:
    """The form that computes: "triton", "cpp" or "reference"; "triton" only where it can be imported.

    Args:
        op: the operator's name, for the errors.
        impl: the form that is asked for, or None.
        tensors: what the operator is given; None stands for an argument that is not there.
        triton: whether impl=None may take Triton for these shapes and dtypes.
        cpp: likewise C++; None where the operator has no such form.

    Raises:
        ValueError: impl names a form that the operator does not have.
        RuntimeError: impl="triton" without the package triton.
    """
    if impl == "triton":
        require_triton(op)
    elif impl not in (None, "reference") and (impl != "cpp" or cpp is None):
        raise ValueError(f"{op}: impl={impl!r} is not built for this operator")
    if impl is not None:
        return impl
    if triton and takes_triton(*tensors):
        return "triton"
    return "cpp" if cpp and takes_cpp(*tensors) else "reference"


def takes_cpp(*tensors: Tensor | None) -> bool:
    """Float32 or bfloat16 on the CPU, outside functorch, where no gradient is wanted and the extension is built."""
    given = [x for x in tensors if x is not None]
    plain = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in given)
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return plain and not wrapped and not wanted and _native.load()[0] is not None


def takes_triton(*tensors: Tensor | None) -> bool:
    """On a GPU in a type of 32 or 16 bits, outside functorch, where no gradient is wanted and Triton is installed."""
    given = [x for x in tensors if x is not None]
    if not all(x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    # torch.compile cannot trace the question whether a tensor is functorch's
    wrapped = not torch.compiler.is_compiling() and any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given)
    return not wrapped and has_triton()


def has_triton() -> bool:
    """Whether Triton can be imported; asked late, so that nothing imports it before it is needed."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def require_triton(op: str) -> None:
    """Raise a RuntimeError that names the operator if Triton cannot be imported."""
    if not has_triton():
        raise RuntimeError(f'{op}: impl="triton" needs the package triton, which is not installed: pip install triton')


def one_dtype(*tensors: Tensor) -> bool:
    """Whether all tensors have the same dtype."""
    return all(x.dtype == tensors[0].dtype for x in tensors)


def adjacent(x: Tensor | None) -> bool:
    """Whether the last dimension has stride 1; True for an argument that is not there."""
    return x is None or x.stride(-1) == 1
