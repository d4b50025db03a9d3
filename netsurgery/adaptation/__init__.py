"""Does the model's own code follow the new sizes, and what does it need so that it does?

``fit_code`` runs the code without data at the new sizes, beside the recorded run. Where the code hard-codes a size,
integers on modules follow (``attributes``, ``repeated_sizes``); else ``module_tracer`` traces the module, and
``forwards`` writes a ``forward`` for it. ``gradient_check`` compares its gradients with those of the code that it
stands for, and ``input_guards`` make sure that it is called as it was traced. ``one_by_one`` tries each group alone.
"""
