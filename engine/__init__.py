"""What runs every script. Nothing here knows of tasks or techniques; store.py alone of the model.

start      before torch is loaded: threads, signals, closed consoles
process    how a script begins, is told to stop, and ends; alone or one of several
knobs      a command line from a dataclass
hardware   device, precision, whether to compile; what a run costs
streams    random numbers: a name and numbers in, a generator out
disk       files that are whole or not there, folders that one run writes at a time
store      models on disk: loaded, or made if they are missing
report     a table, JSON rows, a picture
"""
