"""The one room where tensors change: an Edit is carried out on the model, its optimizers and its averages.

``surgery`` cuts the model, ``optimizers`` the state of optimizers; ``kept_weights`` keeps computed weights as they are.
``dropping`` takes blocks out, ``modules`` replaces modules; ``stages`` goes from stage to stage, ``undo`` back.
"""

from netsurgery.rewriting.surgery import rewrite as rewrite
