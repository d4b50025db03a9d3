"""Searches that grow a network in rounds: many candidates, each trained for a little, and the best one stays.

growing      ``netsurgery.grow``: candidates are planted channels, and only these are trained
widths       ``WidthSearch``: candidates are layers that are widened by copies, and everything is trained
rounds       the rounds that both share: which candidates, which one stays, when to stop
candidates   the groups of units that can grow, each with its price
trials       a candidate made and trained, in this process or in another
fitting      the training of a candidate, and its loss on data held out
split        samples to learn from, samples held out, and what a teacher says of them
journal      what was found so far, on disk: a search that was killed goes on from there
outcome      the rounds as a table and as a picture
"""

from netsurgery.search.growing import grow as grow
from netsurgery.search.outcome import Growth as Growth
from netsurgery.search.outcome import Round as Round
from netsurgery.search.widths import Trained as Trained
from netsurgery.search.widths import Widths as Widths
from netsurgery.search.widths import WidthSearch as WidthSearch
