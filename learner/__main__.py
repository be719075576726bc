"""`python -m learner …`: the entry of a cluster job, the same command line as `diffpo`."""

from learner.cli import main

main()
