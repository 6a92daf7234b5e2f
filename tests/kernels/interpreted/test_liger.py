"""Forces of models whose norms, gates and rotary embeddings are liger-kernel's own, which have a backward pass alone."""

import numpy
import pytest
import triton.language as tl
from transformers.models.llama import modeling_llama
from triton.runtime import interpreter

import tokdyn as td
from tokdyn.testing import random_chis, relative_error, tiny

liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is among the extras of dev on Linux alone")
FP32 = 1e-5  # tests/exact/test_architectures.py
REAL_STEPS = 3e-4  # of a reduction whose jvp is a difference quotient: tests/exact/test_kinds.py
U, O = random_chis([(2, 3)], seed=1), random_chis([(2, 2)], seed=2)  # noqa: E741


@pytest.fixture
def interpreted(monkeypatch):
    """What Triton's interpreter lacks of a GPU: scalars of floating point that are tensors, rsqrt of CUDA's library."""
    from liger_kernel.ops import rms_norm

    own = interpreter._implicit_cvt

    def convert(arg):
        if not isinstance(arg, float):
            return own(arg)
        return tl.tensor(interpreter.TensorHandle(numpy.array([arg], dtype=numpy.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    rsqrt = lambda x: tl.math.rsqrt(x, _semantic=interpreter.interpreter_semantic)  # noqa: E731
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)


def test_liger_kernels_keep_the_rules_of_the_plain_model(interpreted, monkeypatch):
    sft = td.objectives.SFT()
    naive = td.forces(tiny("llama", tied=False), U, O, sft, method="naive").matrix
    expected = td.forces(tiny("llama", tied=False), U, O, sft)
    model = tiny("llama", tied=False)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # given to every later model: put back at the end
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    liger.apply_liger_kernel_to_llama(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    layer = model.model.layers[0]
    for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        assert "liger_kernel" in part.forward.__func__.__module__
    assert "liger_kernel" in modeling_llama.apply_rotary_pos_emb.__module__
    found = td.forces(model, U, O, sft)
    assert relative_error(found.matrix, naive) < FP32
    assert found.coverage == expected.coverage
    reduced = td.forces(model, U, O, sft, reduce="update")
    assert float((reduced.vector - naive.sum(1)).norm()) < REAL_STEPS * float(naive.abs().sum(1).norm())
    assert all("real steps" in rule for rule in reduced.coverage.values())  # and says so
