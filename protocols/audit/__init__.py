"""What attacks on a run found: the statistics behind a finding. Pure functions of numbers; no torch.

intervals.py         exact intervals for proportions
curves.py            ROC of membership scores, true positives where false ones are rare
auc.py               the area under it, with an interval
guessing.py          guesses about canaries, how many, and how many are right
one_run.py           lower bound on ε from one run's guesses
one_run_gaussian.py  the same for a claim of Gaussian DP
canaries.py          both from the scores of canaries, with the ceiling
exposure.py          bits by which a planted secret is given away
releases.py          lower bound on ε from many releases with and without a canary
noise.py             is the noise of the size and shape that is claimed
gaussian_dp.py       μ of Gaussian DP, and ε at a δ

And what is made of the findings:

finding.py           what an attack found: figures, plots, tables, sentences
promise.py           what the Plan promises, and on which terms
spending.py          what a ledger says
provenance.py        the program that made a report
report.py            all of it, signed
verify.py            what can be checked of a report
page.py              the report as one HTML file, with guarantee.py, svg.py, axes.py, wording.py
"""
