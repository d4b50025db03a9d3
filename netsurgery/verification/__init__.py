"""Two oracles that share nothing with the rewriting: removal equals silencing, and renaming does not matter."""

from netsurgery.verification.oracles import permuted_difference as permuted_difference
from netsurgery.verification.oracles import verify as verify
from netsurgery.verification.silencing import silenced as silenced
