"""What surrounds the algorithm, in seven rooms. magpo.py's reader need not open them.

options     what a preset fills in, and what cannot work
folder      metrics, logs, and what a resumed run goes on from
checkpoint  a file of numbers and options, read without running code of the file's
machine     processes, devices, random numbers, one owner for a folder
policies    what PyTorch's distributions lack
returns     running moments, the critic's fit, episodes of an evaluation
terminal    the command line, signals, bars, the final table
"""
