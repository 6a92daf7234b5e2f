"""What a step does through the readout alone: the column `predicted_readout` against td.forces(scope="readout")."""

import pytest
import torch
from loops import EPS, PROBE, PROMPT, answers, data, sft
from torch.func import functional_call, jvp

import tokdyn as td
from tokdyn.sequences import Chi
from tokdyn.testing import tiny

LR = 1.0  # a step far above the weights' last digit, which Δθ = θ' - θ is rounded to
OBSERVED = [chi for chis in PROBE.values() for chi in chis]


def by_the_lookup(model, ids):
    """What the lookup's part of a tied weight's step does through the readout: on the same model untied, by a jvp."""
    twin = tiny(model.config.model_type, tied=False)
    twin.load_state_dict(model.state_dict())
    sft(twin, ids).backward()
    step = -LR * twin.get_input_embeddings().weight.grad

    def log_probs(W, chi):
        log_pi = functional_call(twin, {"lm_head.weight": W}, (chi.ids[None],)).logits[0].log_softmax(1)
        return log_pi[:-1].gather(1, chi.ids[1:, None]).squeeze(1)[chi.scored[1:]]

    return torch.cat([jvp(lambda W, c=chi: log_probs(W, c), (twin.lm_head.weight,), (step,))[1] for chi in OBSERVED]).detach()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_readouts_share_of_a_plain_step_is_what_td_forces_says(family, tied):
    """predicted_readout = eta Σ_l F[m,l]/N at the readout; a tied weight moves there by its lookup's gradient besides."""
    model, ids = tiny(family, tied=tied), data()
    update = [Chi(row, torch.arange(9) >= PROMPT, group=i) for i, row in enumerate(ids)]
    truth = td.forces(model, update, OBSERVED, scope="readout", reduce="update").vector.double() * LR / 20
    if tied:
        cross = by_the_lookup(model, ids).double()
        assert float(cross.norm()) > 0.1 * float(truth.norm())
        truth = truth + cross
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    with td.Monitor(model, opt, probe=PROBE, on_error="raise") as monitor:
        sft(model, ids).backward()
        opt.step()
        step = monitor.step_end()
    found = torch.tensor(step.observed["predicted_readout"].to_pylist(), dtype=torch.float64)
    assert float((found - truth).norm()) < 100 * EPS * float(truth.norm())  # Δθ of 1e-2 beside weights of 0.5
    assert float((step.predicted - truth).norm()) > float(truth.norm())  # most of the step is elsewhere


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options, wrapper",
    [
        (dict(target_modules=["q_proj", "lm_head"]), "Linear"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "ModulesToSaveWrapper"),
    ],
)
def test_an_adapted_readout_is_captured_and_its_probe_is_refused_by_name(options, wrapper):
    """Every probe step says why; c = 1/N and log pi of every step are those of the adapted model all the same."""
    import peft

    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    torch.manual_seed(0)
    model, ids = peft.get_peft_model(tiny("llama", tied=False), config), data()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with td.Monitor(model, opt, probe=PROBE) as monitor:
        with pytest.warns(UserWarning, match=f"lm_head is a {wrapper} with no weight of its own: .* leave it out of PEFT's"):
            for _ in range(2):
                with torch.no_grad():
                    log_probs = answers(model, ids)[0].flatten()
                sft(model, ids).backward()
                opt.step()
                step = monitor.step_end()
                opt.zero_grad()
                torch.testing.assert_close(step.c, torch.full((20,), 1 / 20), rtol=100 * EPS, atol=0)
                torch.testing.assert_close(torch.tensor(step.tokens["log_prob"].to_pylist()), log_probs, rtol=0, atol=100 * EPS)
                assert step.residual < 1e-5 and step.observed is None
    assert [number for number, _ in monitor.problems] == [1, 2]
