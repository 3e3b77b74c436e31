"""What is repeated is recorded once: the host then does no more than a line per launch or node.

Two levels, each noted while the general path runs, and written down as straight-line code:

    tape, replay    the launches, allocations and operators of a node of autograd
    recordings      these by all that they depend on, and whether anybody looks
    programs        the nodes and functions of torch of a whole forward
"""
