"""The Attention tab of TensorBoard: what runs write for it, the routes it asks, and its page.

loader.py    what TensorBoard imports to find the tab
summary.py   the maps of one sentence at one step -> a record in the run's event file
folders.py   what else the runs' directories hold: checkpoints, vectors
plugin.py    the routes: static files, what there is, maps, curves
gate.py      who may have a sentence run
live.py      a typed sentence through a run's checkpoint; the only one that imports torch, when asked
"""

PLUGIN_NAME = "minitf_attention"
