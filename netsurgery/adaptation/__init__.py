"""Does the model's own code follow the new sizes, and what does it need so that it does?

``fit_code`` runs the code without data at the new sizes, beside the recorded run. Where it hard-codes a size, integers on
modules follow (``attributes``, ``repeated_sizes``); else ``module_tracer`` traces the module, and ``forwards`` writes a
``forward`` for it. ``gradient_check`` and ``input_guards`` keep that honest.
"""
