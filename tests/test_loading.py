"""Models and devices that cannot be loaded are said in one sentence."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from tokdyn.loading import DEMO_MODEL, load_model, load_tokenizer


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


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    """transformers makes one without a vocabulary of the configuration, which encodes every text as nothing."""
    shutil.copytree(DEMO_MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ValueError, match="model' has no tokenizer") as error:
        load_tokenizer(str(tmp_path / "model"))
    assert sentence(error)


@pytest.mark.parametrize(
    "known, said", [(None, "the hub cannot be asked .*no network"), (False, "the hub has no model of that name")]
)
def test_a_name_that_is_nowhere_is_said_after_one_request(monkeypatch, known, said):
    """huggingface_hub itself tries each file again for half a minute."""
    asked = []

    def model_info(self, name, **options):
        asked.append(name)
        answer = SimpleNamespace(headers={}, request=None)
        raise OSError("no network") if known is None else RepositoryNotFoundError("404", response=answer)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=f"there is no model folder nowhere/model, and {said}") as error:
        load_tokenizer("nowhere/model")
    assert asked == ["nowhere/model"] and sentence(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_cuda_device_is_said_before_anything_is_loaded():
    with pytest.raises(ValueError, match="device 'cuda:0' was asked for but torch finds no CUDA device: use device=\"cpu\""):
        load_model("no/such", device="cuda:0")


def test_an_unknown_device_is_said():
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_model("no/such", device="gpu")
