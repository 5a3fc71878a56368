import os

# Before PyTorch is loaded: threads that wait for others give their core away. Else, where another process wants one of
# the cores, the others spin for it, and a CPU takes several times as long for a step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
