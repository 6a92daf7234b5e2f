"""The CUDA kernels' own source, compiled for the CPU and run thread by thread, against the specifications in float64.

cuda_emulation/ holds the execution model: threads, barriers, shuffles. What it cannot show is what a GPU's memory and
instructions do; tests/gpu has the same operators on a device.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peaked import peaked_rows
from torch import Tensor

from tokdyn.kernels.token_stats import reference
from tokdyn.kernels.topk_log_probs import reference as topk_reference

ROOT = Path(__file__).parents[2]
NAMES = ("logsumexp", "log_prob", "entropy", "collision", "g_norm", "rank", "argmax", "argmax_log_prob")
EPS = 2.0**-24  # half an ulp of float32, relative
DTYPES = [torch.float32, torch.bfloat16]

if not shutil.which("g++"):
    pytest.skip("no C++ compiler", allow_module_level=True)


class Emulated:
    """One architecture's kernels; `few` rows get large blocks, as on a GPU that they would not fill."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def run(self, name: str, logits: Tensor, *arguments, falling: bool = False, few: bool = False) -> None:
        self.library.set_emulation(falling, 1000 if few else 0)
        T, V = logits.shape
        stride = ctypes.c_int64(logits.stride(0))
        common = (address(logits), int(logits.dtype == torch.bfloat16), ctypes.c_int64(T), ctypes.c_int64(V), stride)
        assert getattr(self.library, name)(*common, *arguments) == 0

    def token_stats(self, logits: Tensor, targets: Tensor, **how) -> dict[str, Tensor]:
        whole = ("rank", "argmax")
        out = [torch.full(targets.shape, -7, dtype=torch.int64 if n in whole else torch.float32) for n in NAMES]
        addresses = (ctypes.c_void_p * 8)(*[o.data_ptr() for o in out])
        self.run("emulated_token_stats", logits, address(targets), addresses, **how)
        return dict(zip(NAMES, out, strict=True))

    def topk(self, logits: Tensor, k: int, **how) -> tuple[Tensor, Tensor]:
        values, ids = torch.full((len(logits), k), -7.0), torch.full((len(logits), k), -7)
        self.run("emulated_topk", logits, k, address(values), address(ids), **how)
        return values, ids


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.fixture(scope="module", params=[800, 900], ids=["sm_80", "sm_90"])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    library = tmp_path_factory.mktemp("cuda") / "emulated.so"
    here = ROOT / "tests" / "kernels" / "cuda_emulation"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    flags += [f"-D__CUDA_ARCH__={request.param}", f"-I{here}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command = ["g++", *flags, here / "emulated.cpp", "-o", library]
    subprocess.run(command, check=True)
    return Emulated(library)


def random_logits(T: int, V: int, dtype: torch.dtype, *, scale: float = 3.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * T + V)
    logits = (torch.randn(T, V, generator=generator) * scale + offset).to(dtype)
    return logits, torch.randint(0, V, (T,), generator=generator)


def check(emulated: Emulated, logits: Tensor, targets: Tensor, **how) -> dict[str, Tensor]:
    """Error against float64 at most twice the largest of the same computation in torch, plus a rounding band.

    The band: e = 2^u carries 2^-22 from the instruction and up to 8 EPS from rounding u, which is below 16 in size where e
    matters, in all 12 EPS; collision has e squared above and below the line, 48 EPS. The emulation's error is half of that.
    """
    truth = dict(zip(NAMES, reference.token_stats(logits.double(), targets), strict=True))
    torch_32 = dict(zip(NAMES, reference.token_stats(logits, targets), strict=True))
    ours = emulated.token_stats(logits, targets, **how)
    for name in NAMES:
        if name in ("rank", "argmax"):
            assert torch.equal(ours[name], truth[name]), name
            continue
        exact = truth[name]
        finite = exact.isfinite()
        assert torch.equal(ours[name][~finite].double(), exact[~finite]), name
        error = (ours[name].double() - exact).abs()[finite]
        torch_error = (torch_32[name].double() - exact).abs()[finite]
        allowed = 48 * EPS * exact.abs()[finite] + 1e-14  # the latter is the rounding of the float64 reference itself
        if len(allowed):
            allowed += 2 * torch_error.max() + (12 * EPS if name == "logsumexp" else 0)
        assert (error <= allowed).all(), f"{name}: {error.tolist()} > {allowed.tolist()}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 7, 8, 9, 255, 4097, 16391, 50257])
@pytest.mark.parametrize("falling", [False, True])
def test_token_stats_agrees_with_the_specification(emulated: Emulated, V: int, dtype: torch.dtype, falling: bool):
    check(emulated, *random_logits(2, V, dtype), falling=falling, few=V % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_target_every_alignment_and_nothing_beyond_the_row(emulated: Emulated, dtype: torch.dtype):
    V = 83
    logits, _ = random_logits(1, V, dtype, scale=1.0)
    row = (2 * logits[0].float()).round().to(dtype)  # ties
    poisoned = torch.full((V + 1, 2 * V + 5), math.nan, dtype=dtype)  # every row has its own alignment
    rows = torch.as_strided(poisoned.flatten(), (V, V), (2 * V + 5, 1), 3)
    rows.copy_(row.expand(V, V))
    assert len({r.data_ptr() % 16 for r in rows}) > 1
    ours = check(emulated, rows, torch.arange(V))
    assert len(set(ours["rank"].tolist())) == V, "ranks of all columns of one row are a permutation"


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_rank_the_lower_column_first(emulated: Emulated, dtype: torch.dtype):
    V = 4099
    targets = torch.tensor([0, 1, 7, 8, 2047, 2048, 4090, 4095, 4098])
    ours = check(emulated, torch.zeros(len(targets), V, dtype=dtype), targets)
    assert torch.equal(ours["rank"], targets) and not ours["argmax"].any()
    logits, targets = random_logits(4, V, dtype, scale=2.0)
    check(emulated, logits.float().round().to(dtype), targets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_zeros_tie(emulated: Emulated, dtype: torch.dtype):
    logits = torch.full((2, 40), -0.0, dtype=dtype)
    logits[:, 20:] = 0.0
    ours = check(emulated, logits, torch.tensor([10, 30]))
    assert ours["rank"].tolist() == [10, 30]


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_legal(emulated: Emulated, dtype: torch.dtype):
    logits, targets = random_logits(8, 20011, dtype)  # two turns of the main loop
    lowest = torch.finfo(dtype).min  # the finite mask value
    generator = torch.Generator().manual_seed(0)
    logits[torch.rand(logits.shape, generator=generator) < 0.5] = -math.inf
    logits[0, :20000] = -math.inf
    logits[1, 10:] = -math.inf
    logits[2] = -math.inf
    logits[2, targets[2]] = 1.5  # certain: p_y = 1
    logits[3, targets[3]] = -math.inf  # impossible: p_y = 0
    logits[4] = lowest
    logits[5] = lowest
    logits[5, 15000] = 0.9 * lowest
    logits[6, :12000:2] = -math.inf
    logits[6, 1:12000:2] = lowest
    logits[7, 77] = -0.9 * lowest
    ours = check(emulated, logits, targets)
    assert [ours[name][2].item() for name in NAMES] == [1.5, 0, 0, 1, 0, 0, targets[2].item(), 0]
    assert ours["log_prob"][3] == -math.inf and ours["entropy"][3] > 0


@pytest.mark.parametrize("few", [False, True])
def test_rows_without_a_softmax(emulated: Emulated, few: bool):
    logits, targets = random_logits(6, 3000, torch.float32)
    clean = emulated.token_stats(logits, targets, few=few)
    broken = logits.clone()
    broken[0] = -math.inf
    broken[1, 2999] = math.inf
    broken[2, 0] = math.nan
    broken[3, targets[3]] = math.nan
    broken[4, 2999] = math.nan
    broken.view(torch.int32)[4, 100:200] = -1  # a NaN with every bit set
    ours = emulated.token_stats(broken, targets, few=few)
    for name in NAMES:
        assert torch.equal(ours[name][5], clean[name][5]), "a row must not see its neighbours"
        if name not in ("rank", "argmax"):
            assert ours[name][:5].isnan().all(), name
    assert ours["rank"].tolist()[:5] == [targets[0], 1 + (logits[1, :2999] > logits[1, targets[1]]).sum(), 0, 0, 0]
    assert ours["argmax"].tolist()[:5] == [0, 2999, -1, -1, -1]


def test_a_target_outside_the_vocabulary_reads_nothing(emulated: Emulated):
    logits, _ = random_logits(3, 100, torch.float32)
    ours = emulated.token_stats(logits, torch.tensor([-1, 100, 5]))
    for name in NAMES:
        assert ours[name][:2].tolist() == {"rank": [0, 0], "argmax": [-1, -1]}.get(name) or ours[name][:2].isnan().all(), name
    check(emulated, logits[2:], torch.tensor([5]))


@pytest.mark.parametrize("offset", [-120.0, 90.0, -3.0e4])
def test_offset_logits(emulated: Emulated, offset: float):
    check(emulated, *random_logits(3, 7001, torch.float32, offset=offset))


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_and_steep_rows(emulated: Emulated, order: str):
    logits, targets = random_logits(3, 5000, torch.float32, scale=30.0)
    check(emulated, logits.sort(1, descending=order == "descending").values, targets)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 75.0])
def test_peaked_rows_keep_relative_accuracy(emulated: Emulated, gap: float):
    """One logit at 0, V - 1 at -gap: closed forms in log1p, where the naive expressions are 0 or rounding noise.

    The exponent u of e = 2^u is rounded, which changes e by gap EPS, and the instruction by 4; collision has e squared.
    """
    logits, targets, expected = peaked_rows(50257, 40000, gap)
    ours = torch.stack([c.double() for c in emulated.token_stats(logits, targets).values()], 1)
    torch.testing.assert_close(ours, expected, rtol=(2 * gap + 8) * EPS, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "k"), [(1, 1), (5, 5), (33, 32), (50, 3), (4097, 10), (16391, 32)])
@pytest.mark.parametrize("falling", [False, True])
def test_topk_agrees_with_the_specification(emulated: Emulated, V: int, k: int, dtype: torch.dtype, falling: bool):
    logits, _ = random_logits(2, V, dtype)
    check_topk(emulated, logits, k, falling=falling, few=k % 2 == 0)


def check_topk(emulated: Emulated, logits: Tensor, k: int, **how) -> None:
    """ids exactly; of the sum's 12 EPS, log Σ e and the result are rounded once more and lie within |z| + |lse|."""
    exact, ids = topk_reference.topk_log_probs(logits.double(), k)
    torch_32, _ = topk_reference.topk_log_probs(logits, k)
    ours, our_ids = emulated.topk(logits, k, **how)
    assert torch.equal(our_ids, ids)
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double().nan_to_num(7), exact[~finite].nan_to_num(7))
    if finite.any():
        error = (ours.double() - exact).abs()[finite]
        allowed = 2 * (torch_32.double() - exact).abs()[finite].max() + EPS * (12 + exact[finite].abs())
        assert (error <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_ties_holes_and_rows_without_a_softmax(emulated: Emulated, dtype: torch.dtype):
    logits, _ = random_logits(9, 5003, dtype)
    logits[0] = 0
    logits[1] = logits[1].float().round().to(dtype)
    logits[2] = -math.inf
    logits[2, [4000, 17, 5002]] = torch.tensor([1.0, 2.0, 1.0], dtype=dtype)
    logits[3] = -math.inf
    logits[4, 4321] = math.inf
    logits[5, [9, 4000]] = math.nan
    logits[6] = torch.arange(5003).to(dtype)  # every column is a new maximum
    logits[7] = -torch.arange(5003).to(dtype)
    logits[8] = -0.0
    logits[8, ::3] = 0.0
    check_topk(emulated, logits, 10)
    check_topk(emulated, logits[:, 1:], 32, falling=True)
