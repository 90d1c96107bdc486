"""
What the safety of a run costs: the time that one run of train.py spends on its lock, its checks and
its checkpoints, as a share of the time of the whole run.

    python tests/bench_saving.py                    the default run
    python tests/bench_saving.py --max_iters=200    with other settings of train.py

The run has one thread. Its time is that of the processor, which other work on the machine does not
change, and the time that fsync waits for the disk, which other work makes longer.
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
os.environ['OMP_NUM_THREADS'] = '1'  # torch reads it when it is imported
import configurator

# (where a function is, its name). None of them calls another one.
MEASURED = [
    (configurator.Logger, '__init__'),         # the lock, an older run, an older log
    (configurator.Logger, 'write'),            # a line of the log
    (configurator.StopSignal, 'by_any_rank'),  # at every step
    (configurator, 'save_checkpoint'),         # with the checks of the weights and of the old file
]

waited = 0.0  # seconds in fsync


def clock():
    """Seconds of this process: of the processor, and of waiting for the disk."""
    return time.process_time() + waited


def measure_fsync():
    """From here on, count the seconds that fsync takes."""
    fsync = os.fsync

    def measured(file):
        global waited
        began = time.perf_counter()
        fsync(file)
        waited += time.perf_counter() - began

    os.fsync = measured


def measure(owner, name, seconds, calls):
    """From here on, add the time of every call of a function to seconds[name], and count it."""
    function = getattr(owner, name)

    def measured(*args, **options):
        began = clock()
        try:
            return function(*args, **options)
        finally:
            seconds[name] += clock() - began
            calls[name] += 1

    setattr(owner, name, measured)


def main():
    seconds = collections.Counter()
    calls = collections.Counter()
    measure_fsync()
    for owner, name in MEASURED:
        measure(owner, name, seconds, calls)
    with tempfile.TemporaryDirectory(dir=ROOT, prefix='out-') as folder:
        sys.argv = [os.path.join(ROOT, 'train.py'), f'--out_dir={folder}/run', *sys.argv[1:]]
        began = clock()
        runpy.run_path(sys.argv[0], run_name='__main__')
        total = clock() - began
    print(f'\n{"":27} calls  seconds  share of {total:.1f} s')
    for owner, name in MEASURED:
        print(f'{owner.__name__}.{name}'.ljust(27),
              f'{calls[name]:5}  {seconds[name]:7.3f}  {seconds[name] / total:7.2%}')
    spent = sum(seconds.values())
    print(f'together{"":25}  {spent:7.3f}  {spent / total:7.2%}')
    print(f'fsync{"":28}  {waited:7.3f}  {waited / total:7.2%}')


if __name__ == '__main__':
    main()
