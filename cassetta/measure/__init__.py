"""How fast the package is, and how much memory it takes: measured on the machine at hand.

cases      named networks, blocks and passes from real work
twins      the same network as plain `torch.nn` modules, on the same parameters
peers      who runs a case: our engines, plain and compiled PyTorch, other packages
correct    whether what is about to be timed computes the right thing
timing     rivals in turns, medians; peak and kept memory
roofs      what the machine could do at best
rows       result files: what a row holds, and on which machine
bench      all of it, case by case
charts     pictures of the result files

`cassetta bench` is the command; nothing here is imported by the rest of the package.
"""
