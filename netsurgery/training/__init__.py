"""Recipes: data, network, penalty, removal and fine-tuning from one file, with checkpoints, a table and pictures."""

from netsurgery.training.recipe import Recipe as Recipe
from netsurgery.training.recipe import read as read
from netsurgery.training.study import run as run
