"""
Kill runs of all four stages (kill -9), resume them, and compare each with a run that was never
killed: weights, optimizer state and log, apart from times, must be equal to the last bit.

    python tests/kill.py                          everything
    python tests/kill.py --stages=sft,ppo         some of it
    python tests/kill.py --placed=10 --random=2   a sample: at most 10 placed and 2 random kills
                                                  of each kind of run
    python tests/kill.py --every-write            thousands of kills

A placed kill comes before a system call by which a run changes a file, or in the middle of a write.
After each the checkpoint must be the last one that was saved. Random kills come at any time.

Each run is a fork of this process, in which torch is imported already, so that a kill with all that
follows takes about a second. With --torchrun=N also N runs per stage are killed under torchrun,
which resumes them by itself.
"""
import argparse
import builtins
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass

from conftest import (CPU, GOLD, ROOT, call, flags, letters, ok, process_of_rank,
                      run_script, same, story, with_checker, write_jsonl)
from conftest import start as start_process

import assets.draw
import ppo     # what the stages import is imported before the first fork
import reward
import sft
import train
from configurator import load_checkpoint, read_log

INTERVAL = 2   # steps between saves
N_SAVES = 3
COMMON = dict(CPU, max_iters=INTERVAL * N_SAVES, eval_interval=INTERVAL, log_interval=1,
              warmup_iters=2)
POST_TRAINING = dict(COMMON, batch_size=4, gradient_accumulation_steps=2, max_new_tokens=2)
EVALUATION = dict(eval_prompts=2, test_prompts=2, test_draws=1)
SETTINGS = {
    'train': dict(COMMON, n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4,
                  gradient_accumulation_steps=2, dropout=0.1, eval_iters=1, sample_tokens=2),
    'sft': dict(POST_TRAINING, **EVALUATION, dropout=0.1),
    'reward': dict(POST_TRAINING, normalize_prompts=2),
    'ppo': dict(POST_TRAINING, **EVALUATION, batch_size=8, minibatch_size=4, kl_control='adaptive'),
}

# The figures of a log that depend on the clock or on the machine.
OF_THE_CLOCK = ('ms', 'tokens_per_second', 'mfu', 'seconds', 'peak_memory_mb', 'rollout_share',
                'episodes_per_second')


# -----------------------------------------------------------------------------
# Watch the system calls of a process, and end it at one of them

class Calls:
    """
    The system calls by which this process changes files: pairs of a function and a file name. The
    process kills itself when it is about to make the call number `fatal` (None = never).
    """

    def __init__(self, fatal=None):
        self.made = []
        self.fatal = fatal

    def before(self, name, path):
        if len(self.made) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.made.append((name, os.path.basename(str(path))))

    def watch(self):
        """Watch the functions of os, and files that are opened for writing."""
        for name in ('fsync', 'ftruncate', 'link', 'mkdir', 'open', 'remove', 'rename', 'replace',
                     'unlink', 'write'):
            setattr(os, name, self.watched(name, getattr(os, name)))
        unwatched_open = builtins.open

        def watched_open(path, mode='r', *args, encoding=None, **options):
            if mode[0] == 'r':
                return unwatched_open(path, mode, *args, encoding=encoding, **options)
            self.before('open', path)
            file = io.BufferedWriter(WatchedFile(path, mode[0], self))
            return file if 'b' in mode else io.TextIOWrapper(file, encoding)

        builtins.open = watched_open

    def watched(self, name, function):
        def watched_function(path, *args, **options):
            self.before(name, path)
            return function(path, *args, **options)
        return watched_function


class WatchedFile(io.FileIO):
    """What is under the buffer of a file. Every write is made in two halves, as a system may."""

    def __init__(self, path, mode, calls):
        super().__init__(path, mode)
        self.calls = calls

    def write(self, data):
        half = len(data) // 2
        self.calls.before('write', self.name)
        n_written = super().write(data[:half])
        self.calls.before('write', self.name)
        return n_written + super().write(data[half:])


def without_hard_links():
    """From here on this process is on a file system that has none."""
    def link(source, target):
        raise OSError('no hard links here')
    os.link = link


# -----------------------------------------------------------------------------
# Run a stage in forks of this process

@dataclass
class Stage:
    """A stage on a number of ranks, with its run that was never killed."""
    name: str
    n_ranks: int
    settings: dict
    reference: str = ''    # the folder of that run
    seconds: float = 0.0   # how long it took

    def command(self, folder):
        """The script and its arguments, for a run in a folder."""
        return [f"{self.name.split(',')[0]}.py", *flags(self.settings, out_dir=folder)]


def fork_rank(script, args, env, output, calls=None, record=None, hard_links=True):
    """
    Run a script in a fork of this process, and return its process id. What it prints is appended to
    the file `output`. `calls` watches its system calls; at its end they are written to `record`.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(env)
        assets.draw.draw_curves = lambda *args: None  # takes longer than the run
        if not hard_links:
            without_hard_links()
        if calls:
            calls.watch()
        sys.argv = [os.path.join(ROOT, script), *args]
        status = run_script(sys.argv[0])
        if record:
            made = list(calls.made)  # without those that follow
            with open(record, 'w', encoding='utf-8') as f:
                json.dump(made, f)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # nothing else of the parent must run here


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def has_checkpoint(folder):
    names = ('ckpt.pt', 'ckpt_prev.pt')
    return any(os.path.exists(os.path.join(folder, name)) for name in names)


def start(stage, folder, again=False, run_id='this run', calls=None, record=None, hard_links=True):
    """
    Start a stage in a run folder; returns the process ids of its ranks. again=True: as torchrun
    restarts several ranks, and as a user resumes one rank.
    """
    script, *args = stage.command(folder)
    output = f'{folder}.out'
    if stage.n_ranks == 1:
        if again and has_checkpoint(folder):
            code = [arg for arg in args if '.py:' in arg]  # must be named again
            args = ['--init_from=resume', f'--out_dir={folder}', *code]
        return [fork_rank(script, args, {}, output, calls, record, hard_links)]
    port = free_port()
    pids = []
    for rank in range(stage.n_ranks):
        env = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(stage.n_ranks),
               'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
               'TORCHELASTIC_RESTART_COUNT': str(int(again)), 'TORCHELASTIC_RUN_ID': run_id}
        if rank == 0:  # which alone changes files
            pids.append(fork_rank(script, args, env, output, calls, record, hard_links))
        else:
            pids.append(fork_rank(script, args, env, output))
    return pids


def wait(pids):
    """Wait for the ranks in turn; once one has failed the others are killed. Returns the first exit
    status that is not 0, else 0. That of a killed process is -9."""
    failure = 0
    for pid in pids:
        if failure:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        failure = failure or os.waitstatus_to_exitcode(status)
    return failure


def complete(stage, folder, **options):
    """Run a stage to its end, after a kill with again=True. AssertionError if it fails."""
    status = wait(start(stage, folder, **options))
    with open(f'{folder}.out', encoding='utf-8') as f:
        assert status == 0, f.read()


# -----------------------------------------------------------------------------
# What must hold after a kill, and at the end

def records_of(folder):
    """The records of a log without the figures of the clock."""
    records = []
    for record in read_log(folder):
        for figures in (record, record.get('final', {})):
            for name in OF_THE_CLOCK:
                figures.pop(name, None)
        records.append(record)
    return records


def check_equal(stage, folder):
    """AssertionError unless a run's folder holds what that of the run does that was not killed."""
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        if not os.path.exists(os.path.join(stage.reference, name)):
            continue
        expected = load_checkpoint(os.path.join(stage.reference, name))
        found = load_checkpoint(os.path.join(folder, name))
        expected['config']['out_dir'] = folder
        expected['run_id'] = found['run_id']
        assert found.keys() == expected.keys()
        for key in expected:
            assert same(found[key], expected[key]), f'{name}: another {key}'
    found = records_of(folder)
    expected = records_of(stage.reference)
    assert len(found) == len(expected), f'{len(found)} records in the log'
    for i, record in enumerate(expected):
        assert found[i] == record, f'record {i} of the log: {found[i]} in place of {record}'
    left = [name for name in os.listdir(folder) if name.endswith('.tmp')]
    assert left == ['notes.tmp'], f'left in the folder: {left}'  # a file of the user


def check_saved(stage, folder, step, exactly=True):
    """AssertionError unless the checkpoint in a folder can be loaded and is that of `step`, or if
    not `exactly` is a later one. Step 0: there need not be one."""
    if step == 0 and not has_checkpoint(folder):
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints if it loads ckpt_prev.pt
            found = load_checkpoint(folder)['step']
    except ValueError as error:
        raise AssertionError('no checkpoint can be loaded') from error
    if stage.name == 'train, best only':
        return  # which steps are saved depends on the losses
    is_right = found == step if exactly else found >= step
    assert is_right, f'the checkpoint is of step {found}, but step {step} was saved'


def contents(folder):
    """The contents of all files of a run, in its folder and the folders in it."""
    found = set()
    for path, _, names in os.walk(folder):
        for name in names:
            if not name.startswith('run.'):  # which process holds the folder
                with open(os.path.join(path, name), 'rb') as f:
                    found.add(f.read())
    return found


# -----------------------------------------------------------------------------
# Placed kills. Each begins in a folder that a scenario prepares; it returns the step of the last
# checkpoint there.

def new_folder(stage, folder):
    return 0


def killed_after_two_saves(stage, folder):
    """ckpt.pt and ckpt_prev.pt are of the two saves."""
    shutil.copytree(f'{stage.reference}.killed', folder, dirs_exist_ok=True)
    return 2 * INTERVAL


def both_names_one_file(stage, folder):
    """Left by a kill between the renames of the second save."""
    killed_after_two_saves(stage, folder)
    os.remove(f'{folder}/ckpt.pt')
    os.link(f'{folder}/ckpt_prev.pt', f'{folder}/ckpt.pt')
    return INTERVAL


def only_ckpt_prev(stage, folder):
    """Left by a kill between the renames on a file system without hard links."""
    killed_after_two_saves(stage, folder)
    os.remove(f'{folder}/ckpt.pt')
    return INTERVAL


def damaged_ckpt(stage, folder):
    """A byte of ckpt.pt has changed since it was saved."""
    killed_after_two_saves(stage, folder)
    with open(f'{folder}/ckpt.pt', 'r+b') as f:
        f.seek(-os.path.getsize(f'{folder}/ckpt.pt') // 2, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    return INTERVAL


def older_run(stage, folder):
    """A run of the same settings has ended there."""
    shutil.copytree(stage.reference, folder, dirs_exist_ok=True)
    return 0


SCENARIOS = {
    'new folder': new_folder,
    'two saves': killed_after_two_saves,
    'both names one file': both_names_one_file,
    'only ckpt_prev': only_ckpt_prev,
    'damaged ckpt': damaged_ckpt,
    'no hard links': killed_after_two_saves,
    'older run': older_run,
}


def is_save(made_call):
    """Whether a call gives a complete checkpoint its name."""
    return made_call == ['replace', 'ckpt.pt.tmp']


def places_to_kill(made, scenario, every_write):
    """The numbers of the calls before which a run is killed. In a new folder these are all calls,
    in other scenarios those up to the end of the first save. Of many writes to one file in a row
    they are the first two and the last two, if not `every_write`."""
    n = len(made)
    if scenario == 'older run':
        n = made.index(['open', 'log.jsonl'])  # by then it has been moved aside
    elif scenario != 'new folder':
        n = 3 + next(place for place in range(n) if is_save(made[place]))
    places = []
    for place in range(n):
        name, _ = made[place]
        is_inner = made[place - 2:place + 3] == [made[place]] * 5  # two before, and two after it
        if every_write or name != 'write' or not is_inner:
            places.append(place)
    return places


def prepared_folder(work, stage, scenario):
    """A new folder of the scenario: (its path, step of its checkpoint)."""
    folder = tempfile.mkdtemp(dir=work)
    with open(f'{folder}/notes.tmp', 'w', encoding='utf-8') as f:
        f.write('mine')
    return folder, SCENARIOS[scenario](stage, folder)


def remove(folder):
    shutil.rmtree(folder)
    os.remove(f'{folder}.out')


def placed_kills(work, stage, scenario, at_most, every_write, rng):
    """Kill a run before each of its system calls, see places_to_kill, or before `at_most` of them.
    Yields (what was about to happen, None or an AssertionError)."""
    options = dict(again=scenario not in ('new folder', 'older run'),
                   hard_links=scenario != 'no hard links')

    # 1. The system calls of a run that is not killed.
    folder, _ = prepared_folder(work, stage, scenario)
    record = os.path.join(work, 'calls.json')
    complete(stage, folder, calls=Calls(), record=record, **options)
    check_equal(stage, folder)
    remove(folder)
    with open(record, encoding='utf-8') as f:
        made = json.load(f)

    # 2. A kill before each of them.
    places = places_to_kill(made, scenario, every_write)
    if at_most < len(places):
        places = sorted(rng.sample(places, at_most))
    for place in places:
        folder, first_step = prepared_folder(work, stage, scenario)
        name, file = made[place]
        what = f'{name} {file}, call {place}, in {folder}'
        try:
            assert wait(start(stage, folder, calls=Calls(place), **options)) == -signal.SIGKILL
            if scenario == 'older run':
                complete(stage, folder, again=stage.n_ranks > 1)
                assert contents(stage.reference) <= contents(folder), 'a file was lost'
            else:
                step = first_step + INTERVAL * sum(map(is_save, made[:place]))
                check_saved(stage, folder, min(step, INTERVAL * N_SAVES))
                complete(stage, folder, again=True)
            check_equal(stage, folder)
        except AssertionError as error:
            yield what, error
        else:
            yield what, None
            remove(folder)


# -----------------------------------------------------------------------------
# Random kills

def random_kills(work, stage, count, rng):
    """Kill a random rank of a run at a random time, and again when it is resumed. Yields as
    placed_kills does."""
    for _ in range(count):
        folder, _ = prepared_folder(work, stage, 'new folder')
        times = [rng.uniform(0, stage.seconds) for _ in range(2)]
        what = f'after {times[0]:.3f} and {times[1]:.3f} s, in {folder}'
        try:
            for again, seconds in enumerate(times):
                pids = start(stage, folder, again=bool(again))
                time.sleep(seconds)
                kill_one(pids, rng)
                records = read_log(folder)
                last_step = records[-1].get('step', INTERVAL * N_SAVES) if records else 0
                check_saved(stage, folder, last_step // INTERVAL * INTERVAL, exactly=False)
            complete(stage, folder, again=True)
            check_equal(stage, folder)
        except AssertionError as error:
            yield what, error
        else:
            yield what, None
            remove(folder)


def kill_one(pids, rng):
    """Kill one of the ranks, then end the others as torchrun does."""
    victim = rng.choice(pids)
    os.kill(victim, signal.SIGKILL)
    for pid in pids:
        if pid != victim:
            os.kill(pid, signal.SIGTERM)
    for pid in pids:
        os.waitpid(pid, 0)


def torchrun_kills(work, stage, count, rng):
    """Kill a random rank of a run of torchrun at a random time; torchrun itself restarts it. Yields
    as placed_kills does."""
    for _ in range(count):
        folder, _ = prepared_folder(work, stage, 'new folder')
        script, *args = stage.command(folder)
        # The variable works around github.com/pytorch/pytorch/issues/135712.
        torchrun = start_process('-m', 'torch.distributed.run', '--standalone',
                                 f'--nproc_per_node={stage.n_ranks}', '--max-restarts=1', script,
                                 *args, env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
        while not os.path.exists(f'{folder}/log.jsonl') and torchrun.poll() is None:
            time.sleep(0.01)
        seconds = rng.uniform(0, stage.seconds)
        rank = rng.randrange(stage.n_ranks)
        what = f'rank {rank} after {seconds:.3f} s, in {folder}'
        time.sleep(seconds)
        try:
            victim = process_of_rank(rank, torchrun.pid)
            if victim:  # otherwise the run has ended
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            stdout, stderr = torchrun.communicate()
            assert torchrun.returncode == 0, stdout + stderr
            check_equal(stage, folder)
        except AssertionError as error:
            yield what, error
        else:
            yield what, None
            shutil.rmtree(folder)


# -----------------------------------------------------------------------------
# All of it

def write_data(work):
    """Two datasets: a text in byte tokens, and examples for the stages after pretraining."""
    with open(f'{work}/story.txt', 'w', encoding='utf-8') as f:
        f.write(story(n_words=1000))
    ok(call('data/text/prepare.py', f'--input={work}/story.txt', f'--out={work}/text'))
    examples = pathlib.Path(work, 'examples')
    examples.mkdir()
    (examples / 'checker.py').write_text(GOLD, encoding='utf-8')
    for split, n in (('train', 40), ('val', 4)):
        for kind, names in (('sft', ['prompt', 'response']), ('prompts', ['prompt', 'response']),
                            ('pref', ['prompt', 'chosen', 'rejected'])):
            rows = []
            for prompt, gold, _, wrong in letters(n, seed=n):
                row = {'prompt': prompt, 'response': gold, 'chosen': gold, 'rejected': wrong}
                rows.append({name: row[name] for name in names})
            write_jsonl(examples / f'{kind}_{split}.jsonl', rows)


def make_stages(work, names, rank_counts):
    """The stages, each with its run that is not killed, in folders of `work`. A stage starts from
    the stages before it, on one rank."""
    write_data(work)
    examples = with_checker(f'{work}/examples')
    data = {'train': dict(dataset=f'{work}/text'),
            'train, best only': dict(dataset=f'{work}/text', always_save_checkpoint=False),
            'sft': dict(dataset=f'{work}/examples', init_from=f'{work}/train-1'),
            'reward': dict(examples, init_from=f'{work}/sft-1'),
            'ppo': dict(examples, init_from=f'{work}/sft-1', reward_model=f'{work}/reward-1')}
    stages = []
    for n_ranks in (1, 2):
        for name, own in data.items():
            is_wanted = name.split(',')[0] in names and n_ranks in rank_counts
            if n_ranks > 1 and not is_wanted:
                continue
            settings = {**SETTINGS[name.split(',')[0]], **own}
            folder = f'{work}/{name}-{n_ranks}'
            stage = Stage(name, n_ranks, settings, reference=folder)
            began = time.perf_counter()
            complete(stage, folder, run_id='an older run')
            stage.seconds = time.perf_counter() - began
            save_state_after_two_saves(work, stage)
            if is_wanted:
                stages.append(stage)
    return stages


def save_state_after_two_saves(work, stage):
    """The folder that scenarios begin with: of a run that was killed after two saves."""
    record = os.path.join(work, 'calls.json')
    folder = f'{stage.reference}.killed'
    complete(stage, folder, calls=Calls(), record=record)
    with open(record, encoding='utf-8') as f:
        made = json.load(f)
    places = [place for place, made_call in enumerate(made) if is_save(made_call)]
    remove(folder)
    wait(start(stage, folder, calls=Calls(places[1] + 1)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--stages', default='train,sft,reward,ppo', help='separated by commas')
    parser.add_argument('--ranks', default='1,2', help='numbers of ranks, separated by commas')
    parser.add_argument('--placed', type=int, default=10 ** 6,
                        help='placed kills of each kind of run, at most')
    parser.add_argument('--every-write', action='store_true', help='of a save, not four per file')
    parser.add_argument('--random', type=int, default=20, help='random kills of each kind of run')
    parser.add_argument('--torchrun', type=int, default=0, help='runs of torchrun per stage')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    # In memory, if that is possible: the results are the same, and nothing waits for a disk.
    memory = '/dev/shm' if os.path.isdir('/dev/shm') else None
    work = tempfile.mkdtemp(prefix='kill_', dir=memory)
    rank_counts = [int(count) for count in args.ranks.split(',')]
    n_failed = 0
    for stage in make_stages(work, args.stages.split(','), rank_counts):
        kinds = {}
        for scenario in SCENARIOS:
            kinds[scenario] = placed_kills(work, stage, scenario, args.placed,
                                           args.every_write, rng)
        kinds['at two random times'] = random_kills(work, stage, args.random, rng)
        if stage.n_ranks > 1 and args.torchrun:
            kinds['under torchrun'] = torchrun_kills(work, stage, args.torchrun, rng)
        for kind, kills in kinds.items():
            results = list(kills)
            failures = [(what, error) for what, error in results if error]
            n_failed += len(failures)
            ranks = '1 rank ' if stage.n_ranks == 1 else f'{stage.n_ranks} ranks'
            print(f'{stage.name:16}  {ranks}  {kind:19}  {len(results):4} runs killed, '
                  f'{len(results) - len(failures):4} resumed equal', flush=True)
            for what, error in failures:
                print(f'    FAILED {what}: {error}', flush=True)
    if n_failed == 0:
        shutil.rmtree(work)
    return 1 if n_failed else 0


if __name__ == '__main__':
    sys.exit(main())
