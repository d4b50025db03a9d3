"""Reading a recorded run: the dimensions of every tensor, the groups that they share, and their costs.

``rules`` holds a line for each operation, in the notation of ``netsurgery.notation``; ``custom_rules`` those of users.
``network`` applies them and makes ``groups``, ``units`` finds the sort of their units, ``blocks`` residual blocks;
``tracing`` makes the network of a model, ``counterparts`` finds its groups in one made from it. ``growth`` finds where
units can be added, with ``domains`` and ``inner_products``.
``computed_weights``, ``weights``, ``low_rank`` and ``proportional`` handle weights that code computes from others.
``costs`` counts parameters and MACs, ``graph_patterns`` finds series of operations. ``replay`` runs a recorded graph on
real tensors, ``replay_without`` does so without some units, with ``statistics`` over the others; ``decided_runs`` runs
code with recorded decisions.
"""
