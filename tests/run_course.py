"""
Run the commands of the course, shortened to a few steps each, in a temporary copy of the project.
Nothing is written to the project's own folder.

    python tests/run_course.py             all chapters
    python tests/run_course.py 2 4.3       chapter 2 and item 4.3

The commands of a chapter are those in its blocks of shell (```sh). What stands before a chapter's
first item is run before any of its items. The blocks are run by bash, as they are written: only
`python` is replaced, by a program that adds the settings of SHORT to the command. Datasets are
prepared in the copy, so the first run needs a network.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDER = 'config/course'
NAMES = ('1-transformer', '2-language-model', '3-modern', '4-scaling', '5-experts', '6-sft',
         '7-reward', '8-ppo')
CHAPTERS = [f'{FOLDER}/{name}.md' for name in NAMES]

# The settings that shorten a command, by its script. They replace what the command says.
SHORT = {
    'train.py': {'max_iters': 2, 'eval_iters': 1, 'sample_tokens': 4},
    'sft.py': {'max_iters': 2, 'eval_prompts': 4, 'test_prompts': 4, 'test_draws': 1},
    'reward.py': {'max_iters': 2, 'max_pairs': 64, 'normalize_prompts': 4},
    'ppo.py': {'max_iters': 2, 'batch_size': 16, 'minibatch_size': 8, 'eval_prompts': 4,
               'test_prompts': 4, 'test_draws': 1},
    'sample.py': {'max_new_tokens': 8},
    'tests/bench_frontier.py': {'prompts': 4},
}

# The files of the project that commands may need.
PARTS = ('*.py', 'assets/*.py', 'config/**/*.py', 'data/**/*.py', 'tests/*.py')


# -----------------------------------------------------------------------------
# Read the chapters


def split_chapter(text):
    """{item: its text} of a chapter, in order; '' is the text before the first item."""
    parts = re.split(r'(?m)^## (\d\.\d) ', text)
    return dict(zip(['', *parts[1::2]], parts[::2]))


def code_blocks(text, language):
    """[(rest of the opening line, content)] of the code blocks of a language."""
    return re.findall(rf'(?ms)^```{language}\b *(.*?)\n(.*?)^```$', text)


def select_blocks(wanted):
    """
    [(item, block of shell)] of the wanted chapters and items, such as ['2', '4.3']; of the whole
    course if there are none. ValueError for a chapter or an item that does not exist.
    """
    found = set()
    blocks = []
    for path in CHAPTERS:
        chapter = Path(path).name[0]
        items = split_chapter((ROOT / path).read_text(encoding='utf-8'))
        known = {chapter, *items}
        if wanted and not known.intersection(wanted):
            continue
        found |= known
        for item, text in items.items():
            if not wanted or chapter in wanted or item in wanted or not item:
                name = item or f'start of chapter {chapter}'
                blocks += [(name, content) for _, content in code_blocks(text, 'sh')]
    unknown = set(wanted) - found
    if unknown:
        raise ValueError(f'the course has no chapter or item {", ".join(sorted(unknown))}')
    return blocks


# -----------------------------------------------------------------------------
# Run them


def shorten(words):
    """
    The arguments of `python` for a short run.

    >>> shorten(['sample.py', '--top_k=5', '--max_new_tokens=300'])
    ['sample.py', '--top_k=5', '--max_new_tokens=8']
    """
    if words[:2] == ['-m', 'pytest']:
        return [*words, '--collect-only', '-q']
    settings = dict(SHORT.get(words[0], {}))
    if '--init_from=resume' in words and 'max_iters' in settings:
        settings['max_iters'] *= 2  # the run that it resumes has ended at max_iters
    shortened = []
    for word in words:
        key = word.removeprefix('--').partition('=')[0]
        if key not in settings:
            shortened.append(word)
    return shortened + [f'--{key}={value}' for key, value in settings.items()]


def copy_project(folder):
    """Copy the project into a folder, without datasets and runs."""
    for pattern in PARTS:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def make_python(folder):
    """Write a program `python` into a folder, which runs shortened commands. Returns the
    environment in which it is found."""
    folder.mkdir()
    program = folder / 'python'
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" tests/run_course.py --shortened "$@"\n',
                       encoding='utf-8')
    program.chmod(0o755)
    return {**os.environ, 'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}'}


def run_block(block, folder, environment):
    """Run a block of shell in a copy of the project. Returns its exit status and its output."""
    result = subprocess.run(['bash', '-euo', 'pipefail', '-c', block], cwd=folder, env=environment,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
    return result.returncode, result.stdout


def main(wanted):
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / 'project'
        copy_project(copy)
        environment = make_python(Path(temporary) / 'bin')
        for item, block in select_blocks(wanted):
            start = time.perf_counter()
            status, output = run_block(block, copy, environment)
            seconds = time.perf_counter() - start
            print(f'{item}: {"failed" if status else "ok"} after {seconds:.0f} s', flush=True)
            if status:
                failed.append(item)
                print(block + '\n'.join(output.splitlines()[-20:]), flush=True)
    if failed:
        sys.exit(f'commands of {", ".join(failed)} failed')


if __name__ == '__main__':
    arguments = sys.argv[1:]
    if arguments[:1] == ['--shortened']:
        # as the program `python` of make_python
        os.execv(sys.executable, [sys.executable, *shorten(arguments[1:])])
    try:
        main(arguments)
    except ValueError as error:
        sys.exit(f'error: {error}')
