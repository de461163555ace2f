"""The Attention tab of TensorBoard: what runs write for it, its server routes and its page.

loader.py    what TensorBoard imports to find the tab
summary.py   the maps of one sentence at one step -> a record in the run's event file
folders.py   checkpoints and vectors in the run directories
plugin.py    the routes: static files, runs, maps, curves
gate.py      access control of the live route
live.py      runs a typed sentence through a checkpoint; the only module that imports torch, on the first request
"""

PLUGIN_NAME = "minitf_attention"
