"""A training watched: what its loss does to every scored token, and what each of its steps does to a probe.

    capture.py          hooks on the model: which route each forward pass offers; td.tap
    recorder.py         one pass until its gradients come: hooks on tensors, the choice of a fit, the self-check
    forward.py          the record of a pass, and the arithmetic of its check; layout.py: where its tokens stand
    diagnosis.py        explains an empty or failed capture
    columns.py          token table and figures of a step; steps.py: its record; step_folder.py: the records on disk
    probe.py            what a step did to a probe, probe_sharded.py: to a sharded model's; observation.py: what both find
    own_passes.py       our own passes through a model under training; distributed.py: the ranks that train together
    weighting.py        hooks that weigh each token's gradient (td.interventions.weighted)

tokdyn/monitor.py puts them together.
"""
