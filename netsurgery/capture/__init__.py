"""Recording a model's own run, on tensors without data, as a torch.fx graph of ATen operations.

``recorder`` writes the graph down, ``program`` declares it. ``meta_run`` runs a copy of the model without data, and
``op_observer`` sees each operation; ``lockstep`` runs code again beside a recorded run. ``fake_device``,
``meta_shapes``, ``copies`` and ``custom_modules`` let code run without data; ``known_values`` has the values that code
looks at. ``side_effects``, ``reachable``, ``caches`` and ``randomness`` make sure that a run leaves nothing behind.
``operations`` has calls of operations; ``inputs``, ``example_inputs`` and ``saved_inputs`` hold inputs of models,
``source_locations`` lines of code. ``refusals`` names the models that cannot be recorded.
"""
