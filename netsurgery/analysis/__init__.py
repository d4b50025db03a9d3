"""Reading a recorded run: the dimensions of every tensor, the groups that they share, and their costs.

``rules`` holds a line for each operation, in the notation of ``netsurgery.notation``; ``custom_rules`` those of users.
``network`` applies them and makes groups, ``units`` says of which sort; ``tracing`` goes from a model to its network.
``computed_weights``, ``weights``, ``low_rank`` and ``proportional`` handle weights that code computes from others.
``costs`` counts parameters and MACs, ``graph_patterns`` finds series of operations. ``replay`` runs a recorded graph on
real tensors, ``replay_without`` lets some units contribute nothing to it, with ``statistics`` over what stays.
"""
