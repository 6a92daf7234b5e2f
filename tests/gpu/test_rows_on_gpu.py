"""token_stats and topk_log_probs on a GPU, by Triton and by CUDA C++."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokdyn import _native, ops

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

NAMES = ops.TokenStats._fields
IMPLS = ["triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def built(impl: str):
    if impl == "cuda" and not hasattr(_native.load()[0], "cuda_token_stats"):
        pytest.skip(f"the CUDA kernels are {_native.parts()['cuda']}")


def random_logits(T: int, V: int, dtype: torch.dtype, scale: float = 3.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(DEVICE).manual_seed(1000 * T + V)
    logits = (torch.randn(T, V, generator=g, device=DEVICE) * scale + offset).to(dtype)
    return logits, torch.randint(0, V, (T,), generator=g, device=DEVICE)


def check(agree, logits: Tensor, targets: Tensor, impl: str, **band: float) -> ops.TokenStats:
    ours, plain, exact = (
        ops.token_stats(z, targets, impl=name)
        for z, name in ((logits, impl), (logits, "reference"), (logits.double(), "reference"))
    )
    for name, value, same, truth in zip(NAMES, ours, plain, exact, strict=True):
        # logsumexp may be near 0 while the logits and log Σ e^z are not
        size = truth.abs() + 1 if name == "logsumexp" else None
        agree(name, value, same, truth, size=size, **band)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 7, 1003, 50257, 151936])
@pytest.mark.parametrize("T", [1, 3, 600])
def test_token_stats(agree, T: int, V: int, dtype: torch.dtype, impl: str):
    check(agree, *random_logits(T, V, dtype), impl)


def test_empty_batch(impl: str):
    ours = ops.token_stats(torch.zeros(0, 7, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), impl=impl)
    assert all(x.shape == (0,) for x in ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_and_nothing_beyond_the_row(agree, dtype: torch.dtype, impl: str):
    V = 1003
    logits, targets = random_logits(20, V, dtype)
    poisoned = torch.full((21 * 1500,), math.nan, dtype=dtype, device=DEVICE)
    view = poisoned.as_strided((20, V), (1499, 1), 3)
    view.copy_(logits)
    assert len({row.data_ptr() % 16 for row in view}) > 1
    check(agree, view, targets, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_signed_zeros(agree, dtype: torch.dtype, impl: str):
    targets = torch.tensor([0, 1, 7, 8, 2047, 2048, 4095, 4098], device=DEVICE)
    level = torch.zeros(len(targets), 4099, dtype=dtype, device=DEVICE)
    level[:, ::3] = -0.0
    ours = check(agree, level, targets, impl)
    assert torch.equal(ours.rank, targets) and not ours.argmax.any()
    logits, targets = random_logits(8, 4099, dtype, scale=2.0)
    check(agree, logits.float().round().to(dtype), targets, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_legal(agree, dtype: torch.dtype, impl: str):
    logits, targets = random_logits(8, 20011, dtype)
    g = torch.Generator(DEVICE).manual_seed(0)
    logits[torch.rand(logits.shape, generator=g, device=DEVICE) < 0.5] = -math.inf
    logits[0, :20000] = -math.inf
    logits[1, 10:] = -math.inf
    logits[2] = -math.inf
    logits[2, targets[2]] = 1.5  # certain
    logits[3, targets[3]] = -math.inf  # impossible
    logits[4] = torch.finfo(dtype).min  # the finite mask value
    logits[5, :12000:2] = -math.inf
    logits[5, 1:12000:2] = torch.finfo(dtype).min
    check(agree, logits, targets, impl)


def test_rows_without_a_softmax(impl: str):
    logits, targets = random_logits(7, 3000, torch.float32)
    clean = ops.token_stats(logits, targets, impl=impl)
    broken, wrong = logits.clone(), targets.clone()
    broken[0] = -math.inf
    broken[1, 2999] = math.inf
    broken[2, 0] = broken[3, targets[3]] = broken[4, 2999] = math.nan
    wrong[5] = 3000
    ours = ops.token_stats(broken, wrong, impl=impl)
    for name, value, before in zip(NAMES, ours, clean, strict=True):
        assert torch.equal(value[6], before[6]), "a row must not see its neighbours"
        if name not in ("rank", "argmax"):
            assert value[:6].isnan().all(), name
    above = int((logits[1, :2999] > logits[1, targets[1]]).sum())
    assert ours.rank.tolist()[:6] == [int(targets[0]), 1 + above, 0, 0, 0, 0]
    assert ours.argmax.tolist()[:6] == [0, 2999, -1, -1, -1, -1]


@pytest.mark.parametrize("offset", [-120.0, 90.0, -3.0e4])
def test_offset_and_steep_rows(agree, offset: float, impl: str):
    check(agree, *random_logits(3, 7001, torch.float32, offset=offset), impl)
    logits, targets = random_logits(3, 7001, torch.float32, scale=30.0)
    check(agree, logits.sort(1).values, targets, impl)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 75.0])
def test_peaked_rows_keep_their_digits(agree, gap: float, impl: str):
    """The exponent u of e = 2^u is rounded, which changes e by gap EPS, and the instruction by 4; collision has e squared."""
    band = (2 * gap + 8) * 2.0**-24
    logits = torch.full((2, 50257), -gap, device=DEVICE)
    logits[:, 40000] = 0
    ours = check(agree, logits, torch.tensor([40000, 7], device=DEVICE), impl, band=band)
    each = math.exp(-gap)
    exact = math.log1p(50256 * each) + 50256 * each * gap / (1 + 50256 * each)
    assert float(ours.entropy[0]) == pytest.approx(exact, rel=band)


def test_offsets_beyond_32_bits(agree, impl: str):
    """Rows 2^31 elements apart, and more than 2^31 logits in all."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    buffer = torch.empty(2**31 + 5000, dtype=torch.bfloat16, device=DEVICE)
    far = buffer.as_strided((2, 1003), (2**31 + 8, 1), 0)
    logits, targets = random_logits(2, 1003, torch.bfloat16)
    far.copy_(logits)
    check(agree, far, targets, impl)
    V = 151936
    T = len(buffer) // V
    many = buffer[: T * V].view(T, V)
    assert T * V > 2**31 - V
    many.zero_()
    logits, targets = random_logits(3, V, torch.bfloat16)
    many[-3:] = logits
    ours = ops.token_stats(many, torch.cat([targets.new_zeros(T - 3), targets]), impl=impl)
    for name, value, alone in zip(NAMES, ours, ops.token_stats(logits, targets, impl=impl), strict=True):
        agree(name, value[-3:], alone, alone.double() if alone.is_floating_point() else alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "V", "k"), [(3, 5, 5), (600, 1003, 32), (3, 50257, 10), (600, 151936, 10), (3, 151936, 32)])
def test_topk(agree, T: int, V: int, k: int, dtype: torch.dtype, impl: str):
    check_topk(agree, random_logits(T, V, dtype)[0], k, impl)


def check_topk(agree, logits: Tensor, k: int, impl: str) -> None:
    (ours, ids), (plain, _), (exact, true_ids) = (
        ops.topk_log_probs(z, k, impl=name)
        for z, name in ((logits, impl), (logits, "reference"), (logits.double(), "reference"))
    )
    agree("ids", ids, ids, true_ids)
    agree("values", ours, plain, exact, size=exact.abs().nan_to_num(0, 0, 0) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_ties_and_holes(agree, dtype: torch.dtype, impl: str):
    logits, _ = random_logits(5, 5003, dtype)
    logits[0] = 0
    logits[1] = logits[1].float().round().to(dtype)
    logits[2] = -math.inf
    logits[2, [4000, 17, 5002]] = torch.tensor([1.0, 2.0, 1.0], dtype=dtype, device=DEVICE)
    logits[3] = torch.arange(5003, device=DEVICE).to(dtype)
    logits[4] = -torch.arange(5003, device=DEVICE).to(dtype)
    check_topk(agree, logits, 10, impl)
    check_topk(agree, logits[:, 1:], 32, impl)


def test_topk_of_a_row_with_nan(impl: str):
    logits, _ = random_logits(3, 5003, torch.float32)
    clean, clean_ids = ops.topk_log_probs(logits, 4, impl=impl)
    logits[1, [9, 4000]] = math.nan
    values, ids = ops.topk_log_probs(logits, 4, impl=impl)
    assert values[1].isnan().all()
    assert torch.equal(values[::2], clean[::2]) and torch.equal(ids[::2], clean_ids[::2])


def test_launches_follow_the_current_stream_and_wait_for_nothing(impl: str):
    logits, targets = random_logits(64, 50257, torch.bfloat16)
    expected = ops.token_stats(logits, targets, impl=impl), ops.topk_log_probs(logits, 8, impl=impl)
    late = torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second, in which a launch on another stream would read zeros
            late.copy_(logits)
            found = ops.token_stats(late, targets, impl=impl), ops.topk_log_probs(late, 8, impl=impl)
            assert not stream.query(), "the call returned before the device was done"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for one, other in zip(expected, found, strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y)


def test_compiled_and_registered(impl: str):
    logits, targets = random_logits(6, 1003, torch.bfloat16)
    torch.library.opcheck(getattr(torch.ops.tokdyn, f"token_stats_{impl}").default, (logits, targets))
    step = torch.compile(lambda z, y: ops.token_stats(z * 2, y, impl=impl).entropy + 1, fullgraph=True)
    assert torch.equal(step(logits, targets), ops.token_stats(logits * 2, targets, impl=impl).entropy + 1)


def test_bad_input_is_named(impl: str):
    logits, targets = random_logits(2, 50, torch.float32)
    for bad, words in (
        (logits.double(), "float32"),
        (logits.T.contiguous().T, "adjacent"),
        (logits.cpu(), "GPU|CUDA device|one device"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.token_stats(bad, targets, impl=impl)
    with pytest.raises(ValueError, match="k"):
        ops.topk_log_probs(logits, 51, impl=impl)
