"""Recording a model's own run, on tensors without data, as a torch.fx graph of ATen operations.

``recorder`` runs the model and writes the graph down; ``lockstep`` runs code again beside a recorded run.
``fake_device``, ``meta_shapes`` and ``copies`` let code run without data; ``known_values`` has the values that it looks
at. ``side_effects``, ``reachable`` and ``caches`` see to it that a run leaves nothing behind.
"""
