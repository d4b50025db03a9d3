"""Find out how a model's own code can follow new sizes.

``fit_code`` runs the code without data at the new sizes, in lockstep with the recorded run (``size_checker``). For code
that hard-codes a size ``remedies`` looks for help: integers on modules (``attributes``, ``repeated_sizes``), or else a
``forward`` that is generated (``forwards``) from a trace of the module (``module_tracer``, with ``function_recorder``,
``traced_numbers`` and ``size_arguments``). ``gradient_check`` compares its gradients with those of the original code,
``input_guards`` refuse inputs that it was not traced with. ``one_by_one`` tries each group alone. ``model_code`` keeps
the traces, which serve all sizes.
"""
