"""What is silently wrong in a training, found before it costs a run: `tokdyn check` on a file, `td.check` on a trainer.

    finding.py          Finding and Report: what, where, the number that shows it, what to do
    texts.py            a file's answers as template and tokenizer make them; data.py: the checks of them
    template.py         the checks of a chat template
    seen.py             what one step of a training showed; the checks of it, one function each, are in
    tokens.py           which tokens are scored: roles, beginnings and ends, padding
    log_probs.py        log-probs against the model's own, and old against new
    scale.py            c against the objective that the trainer names
    rows.py             rows of a batch against the same rows alone; the reference
    weights.py          the readout, parameters without gradient
    displacement.py     answers that one step makes less likely, and the tokens that do it
    run.py              runs them, whatever one of them raises

Every check is a function of what it looks at, `Texts` or `Seen`, that returns findings; none where it does not apply.
docs/check.md lists them with cause, symptom and cure.
"""
