"""What run.py and the command line are made of. magpo.py's reader need not open these rooms.

options     what a preset fills in, what cannot work, and what follows
checkpoint  a file of numbers and options, read without running code of the file's
machine     processes, devices, random numbers, one owner for a folder
policies    what PyTorch's distributions lack
returns     running moments, the critic's fit, episodes of an evaluation
terminal    the command line, signals, the final table
"""
