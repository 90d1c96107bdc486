"""
What the safety of a run costs: the time that one run of train.py spends on its lock, its checks and
its checkpoints, as a share of the time of the whole run.

    python tests/bench_saving.py                    the default run
    python tests/bench_saving.py --max_iters=100    with other settings of train.py

All figures are of one run in one process, so other work on the machine slows both sides of the
share.
"""
import collections
import os
import runpy
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import configurator

# (where a function is, its name). None of them calls another one.
MEASURED = [
    (configurator, 'lock_run_folder'),
    (configurator, 'move_old_run_aside'),
    (configurator, 'read_log'),
    (configurator.StopSignal, 'by_any_rank'),     # at every step
    (configurator.Logger, 'write'),               # every line of the log is opened and closed
    (configurator, 'save_checkpoint'),            # with the check of the weights, and fsync
]


def measure(owner, name, seconds, calls):
    """From here on, add the time of every call of a function to seconds[name], and count it."""
    function = getattr(owner, name)

    def measured(*args, **options):
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds[name] += time.perf_counter() - began
            calls[name] += 1

    setattr(owner, name, measured)


def main():
    seconds = collections.Counter()
    calls = collections.Counter()
    for owner, name in MEASURED:
        measure(owner, name, seconds, calls)
    with tempfile.TemporaryDirectory(dir=ROOT, prefix='out-') as folder:
        sys.argv = [os.path.join(ROOT, 'train.py'), f'--out_dir={folder}/run', *sys.argv[1:]]
        began = time.perf_counter()
        runpy.run_path(sys.argv[0], run_name='__main__')
        total = time.perf_counter() - began
    print(f'\n{"":24} calls  seconds   share of {total:.1f} s')
    for _, name in MEASURED:
        print(f'{name:24} {calls[name]:5}  {seconds[name]:7.3f}  {seconds[name] / total:7.2%}')
    spent = sum(seconds.values())
    print(f'{"together":24} {sum(calls.values()):5}  {spent:7.3f}  {spent / total:7.2%}')


if __name__ == '__main__':
    main()
