"""The one room where tensors change: an Edit is carried out on the model, its optimizers and its averages."""

from netsurgery.rewriting.surgery import rewrite as rewrite
