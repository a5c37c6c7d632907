"""What surrounds a run, in five rooms. magpo.py's reader need not open them.

options     what a preset fills in, and what cannot work
folder      metrics, logs, and what a resumed run goes on from
checkpoint  a file of numbers and options, read without running code of the file's
machine     processes, devices, random numbers, one owner for a folder
terminal    the command line, signals, bars, the final table
"""
