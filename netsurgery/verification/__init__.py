"""Two oracles that take nothing from the rewriting: removal equals silencing, and renaming does not matter.

``silencing`` runs the original with every removed unit zeroed; ``oracles`` compares. Axis expressions are evaluated
here once more, apart from ``netsurgery.positions``, on purpose: an oracle must not share a mistake with what it judges.
"""

from netsurgery.verification.oracles import permuted_difference as permuted_difference
from netsurgery.verification.oracles import verify as verify
from netsurgery.verification.silencing import silenced as silenced
