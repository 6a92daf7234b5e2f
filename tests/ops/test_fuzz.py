"""Operators on whatever Hypothesis makes up: every form gives what the specification gives, or all raise the same error.

`make fuzz` runs many more cases than the few of `make test`: --fuzz N is how many of each test.
"""

import inspect
import math

import pytest
import torch

from tokdyn import ops

pytest.importorskip("hypothesis")  # among the extras of dev

from cases import tried  # noqa: E402
from hypothesis import assume  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EPS = torch.finfo(torch.float32).eps


def plain(op):
    """An operator without the shape checks that tests put around it: its own are tried here."""
    return inspect.unwrap(getattr(ops, op))


small = st.integers(0, 5)
ODD = [0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 3.4e38, math.inf, -math.inf, math.nan]
seeds = st.integers(0, 2**31)


def tensor(draw, *sizes, dtype=torch.float32, odd=True):
    """Normal numbers, and with `odd` a few that are not."""
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(draw(seeds)))
    if odd and x.numel():
        for _ in range(draw(st.integers(0, 3))):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(ODD))
    return x.to(dtype)


@st.composite
def case(draw, op, odd=True):
    """The arguments of an operator that fit, as a dict in their order."""
    T, V, d, k = draw(small), draw(st.integers(1, 40)), draw(small), draw(small)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    make = lambda *sizes: tensor(draw, *sizes, dtype=dtype, odd=odd)  # noqa: E731
    ids = lambda n, most: torch.randint(0, most, (n,), generator=torch.Generator().manual_seed(draw(seeds)))  # noqa: E731
    cap, scale = draw(st.sampled_from([None, 0.5, 30.0])), draw(st.sampled_from([1.0, -0.3, 0.0]))
    if op in ("apply_A", "softmax_jvp"):
        return dict(logits=make(T, V), x=make(T, V, *draw(st.sampled_from([(), (k,)]))))
    if op == "token_stats":
        return dict(logits=make(T, V), targets=ids(T, V))
    if op == "topk_log_probs":
        return dict(logits=make(T, V), k=draw(st.integers(1, V)))
    readout = dict(bias=draw(st.sampled_from([None, 1])) and make(V), scale=scale, softcap=cap)
    if op == "linear_token_stats":
        return (
            dict(hidden=make(T, d), weight=make(V, d), targets=ids(T, V))
            | readout
            | dict(temperature=draw(st.sampled_from([1.0, 0.7])))
        )
    if op == "linear_topk_log_probs":
        return dict(hidden=make(T, d), weight=make(V, d), k=draw(st.integers(1, V))) | readout
    M, L, K = draw(small), draw(small), draw(st.sampled_from([(), (1,), (3,)]))
    if op == "readout_forces":
        sided = dict(v=draw(st.sampled_from([None, 1])) and make(L), uniform=draw(st.sampled_from([None, 1])) and make(L))
        return (
            dict(h_o=make(M, d), y_o=ids(M, V), h_u=make(L, d), targets_u=ids(L * math.prod(K), V).view(L, *K), c=make(L, *K))
            | dict(weight=make(V, d), train_bias=draw(st.booleans()), reduce=draw(st.sampled_from([None, "update", "observe"])))
            | readout | sided
        )  # fmt: skip
    if op == "dual_gram":
        p, q = draw(small), draw(small)
        out = draw(st.sampled_from([None, torch.float32]))
        segments = draw(st.sampled_from([None, (2, 3)])) if M and L else None
        return dict(
            a1=make(M, p), a2=make(L, p), d1=make(M, q), d2=make(L, q),
            out=None if out is None else torch.zeros((M, L) if segments is None else segments, dtype=out),
            segments=segments and (ids(M, 2), ids(L, 3)),
        )  # fmt: skip
    B, Hk, G, T, S, D, E, n = (draw(st.integers(1, 3)) for _ in range(8))
    D, E = draw(st.sampled_from([(16, 16), (16, 32), (D, E)]))
    T, n = draw(st.sampled_from([T, 0, 70])), draw(st.sampled_from([n, 0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    mask = draw(st.sampled_from([None, B, 1]))
    mask = None if mask is None else torch.rand(mask, 1, T, S, generator=torch.Generator().manual_seed(draw(seeds))) < 0.6
    given = dict(q=make(B, Hk, G, T, D).to(dtype), k=make(B, Hk, S, D).to(dtype), v=make(B, Hk, S, E).to(dtype))
    if op == "tangent_attention":
        given |= dict(
            dq=make(n, B, Hk, G, T, D).to(dtype), dk=make(n, B, Hk, S, D).to(dtype), dv=make(n, B, Hk, S, E).to(dtype)
        )
    if op == "cotangent_attention":
        given |= dict(do=make(n, B, Hk, G, T, E).to(dtype))
    return given | dict(mask=mask, scale=scale, softcap=cap)


OPS = ops.__all__[1:]
CPP = {
    "token_stats",
    "topk_log_probs",
    "linear_token_stats",
    "linear_topk_log_probs",
    "readout_forces",
    "dual_gram",
    "cotangent_attention",
}


def called(op, given, impl):
    """Its results as a list, or the error it raises."""
    given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    try:
        found = plain(op)(**given, impl=impl)
    except (ValueError, RuntimeError) as error:
        return error
    return list(found) if isinstance(found, tuple) else [found]


def same(op, given, other, one):
    """Whether two forms agree: integers exactly, what is not finite in the same places, the rest to rounding.

    Every number is a sum of products; one that is not finite may come of an intermediate that is too large for one order of
    summing and not for the other, so that huge inputs are compared for errors and shapes alone.
    """
    assert [(x.shape, x.dtype) for x in other] == [(x.shape, x.dtype) for x in one] or op == "dual_gram"
    floats = [x for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if (
        any(bool((x.abs() > 1e6).any()) or not bool(x.isfinite().all()) for x in floats)
        and "stats" not in op
        and "topk" not in op
    ):
        return
    largest = [1 + float(x.double().nan_to_num(0, 0, 0).abs().max()) for x in floats if x.numel()]
    terms, eps = max([2, *(x.numel() for x in floats)]), max([EPS, *(torch.finfo(x.dtype).eps for x in floats)])
    for x, y in zip(other, one, strict=True):
        if x.is_floating_point():  # a sum of so many products of one factor each, which may cancel
            atol = terms * eps * (1.0 if "stats" in op or "topk" in op else math.prod(largest))
            torch.testing.assert_close(x.double(), y.double(), rtol=64 * eps, atol=atol, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_every_form_gives_what_the_specification_gives(op, fuzz_cases):
    """Sizes of 0 and 1, infinities, NaN, huge numbers, three dtypes, all options."""

    def check(arguments):
        truth = called(op, arguments, "reference")
        assert not isinstance(truth, Exception), truth
        same(op, arguments, called(op, arguments, None), truth)
        tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if op in CPP and all(x.dtype in (torch.float32, torch.bfloat16) for x in tensors):
            found = called(op, arguments, "cpp")
            if isinstance(found, Exception) and op == "cotangent_attention":
                assert "multiple of 16" in str(found)
            else:
                assert not isinstance(found, Exception), found
                same(op, arguments, found, truth)

    tried(fuzz_cases, case(op), check)


@pytest.mark.parametrize("op", OPS)
def test_what_does_not_fit_is_refused_by_every_form_alike(op, fuzz_cases):
    """One argument made longer, shorter, of one dimension more or less, of another dtype, or a number out of its range."""

    @st.composite
    def spoiled(draw):
        arguments = draw(case(op, odd=False))
        names = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.numel() > 0 and x.shape[-1] > 0]
        numbers = [n for n in ("softcap", "temperature", "k", "scale") if n in arguments and not torch.is_tensor(arguments[n])]
        name = draw(st.sampled_from([*names, *numbers] or ["impl"]))
        x = arguments.get(name)
        if name in numbers:
            bad = {"softcap": [-1.0, 0.0, math.nan, math.inf], "temperature": [-1.0, 0.0, math.nan], "k": [0, -1, 10**6],
                   "scale": [math.nan, math.inf]}[name]  # fmt: skip
            return arguments | {name: draw(st.sampled_from(bad))}
        assume(name != "impl")
        how = draw(st.sampled_from(["dtype", "dimension", "longer"]))
        if how == "dtype":
            return arguments | {name: x.to(torch.int32 if x.is_floating_point() or x.dtype == torch.int64 else torch.float32)}
        if how == "dimension":
            changed = x[None] if draw(st.booleans()) or op in ("apply_A", "softmax_jvp", "readout_forces") else x[0]
            columns = op in ("apply_A", "softmax_jvp") and name == "x" and x.dim() == 2  # [1, T, V] may be [T, V, k]
            assume(not columns or changed.shape[:2] != arguments["logits"].shape)
            return arguments | {name: changed}
        axis = draw(st.integers(0, x.dim() - 1))
        if not free(op, name, axis, arguments):
            return arguments | {name: torch.cat([x, x.narrow(axis, 0, 1)], axis)}
        assume(False)  # to make it longer is a case that fits

    def check(arguments):
        errors = {impl: called(op, arguments, impl) for impl in (None, "reference", *(("cpp",) if op in CPP else ()))}
        assert all(isinstance(error, ValueError) for error in errors.values()), errors
        assert len({str(error) for error in errors.values()}) == 1 and op in str(errors[None])

    tried(fuzz_cases, spoiled(), check)


ATTENTION = dict(q="B Hk G T D", k="B Hk S D", v="B Hk S E", mask="B . T S")
FORMS = {
    "attention": ATTENTION,
    "tangent_attention": ATTENTION | dict(dq="n B Hk G T D", dk="n B Hk S D", dv="n B Hk S E"),
    "cotangent_attention": ATTENTION | dict(do="n B Hk G T E"),
    "apply_A": dict(logits="T V", x="T V k"),
    "softmax_jvp": dict(logits="T V", x="T V k"),
    "token_stats": dict(logits="T V", targets="T"),
    "topk_log_probs": dict(logits="T V"),
    "linear_token_stats": dict(hidden="T d", weight="V d", targets="T", bias="V"),
    "linear_topk_log_probs": dict(hidden="T d", weight="V d", bias="V"),
    "readout_forces": dict(h_o="M d", y_o="M", h_u="L d", targets_u="L K", c="L K", weight="V d", bias="V", v="L", uniform="L"),
    "dual_gram": dict(a1="M p", a2="L p", d1="M q", d2="L q", out="M L"),
}


def free(op, name, axis, arguments):
    """Whether a size is nobody else's, or may be anything: to make it longer is a case that fits."""
    form = FORMS[op][name].split()
    if name == "mask" and axis == 0:
        return len(arguments["mask"]) + 1 == len(arguments["q"])
    if name == "out" and arguments["segments"] is not None:
        return True
    others = [FORMS[op][other] for other, x in arguments.items() if other in FORMS[op] and x is not None and other != name]
    return form[axis] != "." and not any(form[axis] in other.split() for other in others)


def test_a_gradient_that_does_not_fit_is_not_read_outside_its_memory():
    """The case that read beyond the heap: `do`, k or v shorter than q says, in the C++ form itself too."""
    from tokdyn.kernels.cotangent_attention import cpp

    q, k, v, do = (torch.randn(s) for s in ((1, 1, 1, 64, 16), (1, 1, 64, 16), (1, 1, 64, 16), (1, 1, 1, 1, 64, 16)))
    for arguments in ((q, k, v, do[..., :3, :]), (q, k[:, :, :3], v, do), (q, k, v[:, :, :3], do), (q, k, v, do[..., :0])):
        for form in (plain("cotangent_attention"), inspect.unwrap(cpp.cotangent_attention)):
            with pytest.raises(ValueError, match="cotangent_attention: .* must be"):
                form(*arguments, None, 1.0)
