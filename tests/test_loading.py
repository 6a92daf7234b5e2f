"""Models and devices that cannot be loaded are said in one sentence."""

import pytest
import torch

from tokdyn.loading import load_model


def sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_model_folder_that_is_absent_or_holds_none_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no model folder .*/none") as error:
        load_model(str(tmp_path / "none"))
    assert sentence(error)
    with pytest.raises(ValueError, match="holds no model: it has no config.json") as error:
        load_model(str(tmp_path))
    assert sentence(error)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="cannot load the tokenizer of .*") as error:
        load_model(str(tmp_path))
    assert sentence(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_cuda_device_is_said_before_anything_is_loaded():
    with pytest.raises(ValueError, match="device 'cuda:0' was asked for but torch finds no CUDA device: use device=\"cpu\""):
        load_model("no/such", device="cuda:0")


def test_an_unknown_device_is_said():
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_model("no/such", device="gpu")
