"""On PYTHONPATH: in a job's first two starts each step takes a while longer, so that it meets its time limit twice on
any machine."""

import importlib.abc
import importlib.machinery
import os
import sys
import time

SECONDS = 2.5


class SlowSteps(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainer.train":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            train_step = module.train_step

            def slow_train_step(*args):
                time.sleep(SECONDS)
                return train_step(*args)

            module.train_step = slow_train_step

        spec.loader.exec_module = exec_module
        return spec


if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < 2:
    sys.meta_path.insert(0, SlowSteps())
