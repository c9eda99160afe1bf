"""Differential privacy: mechanisms, their noise, what they spend, and the ledger of it. No torch.

mechanism.py    what a Plan promises: sampling, clipping, noise and accounting in one value
clipping.py     updates cut to a norm, and a norm that follows them
central.py      noise on a sum, once
distributed.py  noise in shares, under secure aggregation
noise.py        the noise itself; sampler.py draws it
accounting.py   ε by PLD and RDP, and the noise that an ε needs
ledger.py       what was spent, written before it is
"""
