"""Accumulation, padding, packing and cut logits: each token is found where it stands, with its own c."""

import torch
from captures import ROUNDING, V, captured, data, log_probs, one
from loops import EPS

from tokdyn.testing import tiny


def test_accumulation_and_scale_sit_inside_c():
    ids, labels = data()
    model = tiny("llama")

    def loss_of(m):
        (m(ids, labels=labels).loss / 4).backward()
        return m(ids[:1], labels=labels[:1]).loss / 4

    a, b = captured(model, loss_of).forwards
    torch.testing.assert_close(a.c, torch.full((15,), 1 / 60), rtol=100 * EPS, atol=0)
    torch.testing.assert_close(b.c, torch.full((5,), 1 / 20), rtol=100 * EPS, atol=0)


def test_left_padding_and_packing_are_undone():
    """The same two sequences right-padded, left-padded and packed give the same tokens, positions, c and statistics."""
    ids = torch.randint(0, V, (14,), generator=torch.Generator().manual_seed(1))
    a, b = ids[:6], ids[6:]
    pad = torch.zeros(2, dtype=torch.long)
    right = (torch.stack([torch.cat([a, pad]), b]), torch.tensor([[1] * 6 + [0] * 2, [1] * 8]))
    left = (torch.stack([torch.cat([pad, a]), b]), torch.tensor([[0] * 2 + [1] * 6, [1] * 8]))
    model, found = tiny("llama"), []
    for batch, mask in (right, left):
        labels = batch.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)  # nothing real precedes a first token
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = dict(attention_mask=mask, position_ids=positions, labels=labels)
        found.append(one(model, lambda m, x=batch, i=inputs: m(x, **i).loss))
    labels = ids.clone()
    labels[6] = -100  # the first label of a packed document belongs to nobody
    inputs = dict(position_ids=torch.cat([torch.arange(6), torch.arange(8)])[None], labels=labels[None], use_cache=False)
    found.append(one(model, lambda m: m(ids[None], **inputs).loss))
    first = found[0]
    for f in found:
        chis = f.chis()
        assert [chi.ids.tolist() for chi in chis] == [a.tolist(), b.tolist()]
        assert [int(chi.scored.sum()) for chi in chis] == [5, 7]
        assert f.position.tolist() == [*range(1, 6), *range(1, 8)] and f.residual < ROUNDING
        torch.testing.assert_close(f.c, torch.full((12,), 1 / 12), rtol=100 * EPS, atol=0)
        torch.testing.assert_close(f.stats.log_prob, first.stats.log_prob, rtol=0, atol=200 * EPS * 5)  # log-probs of size 5


def test_logits_of_the_last_tokens_only():
    ids, _ = data()
    forward = one(tiny("llama"), lambda m: -log_probs(m(ids, logits_to_keep=4).logits, ids[:, 5:]).sum())
    assert forward.position.tolist() == [6, 7, 8] * 3 and torch.equal(forward.targets, ids[:, 6:].flatten())
    assert forward.residual < ROUNDING
