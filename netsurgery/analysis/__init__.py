"""Reading a recorded run: the dimensions of every tensor, the groups that they share, and what these cost.

``rules`` holds a line for each operation, in the notation of ``netsurgery.notation``; ``custom_rules`` those of users.
``network`` applies them and makes groups; ``computed_weights``, ``weights`` and ``low_rank`` know of weights that code
computes from others. ``replay`` runs a recorded graph on real tensors.
"""
