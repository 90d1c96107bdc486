"""The course of README: its forty items are all there, and the code, tests and commands that it names exist."""
import ast
import functools
import os
import re
import shlex

import pytest

from configurator import read_settings, run_config_file
from conftest import ROOT

ITEMS = [f'{part}.{i}' for part, n in enumerate((7, 6, 6, 5, 3, 4, 4, 5), 1) for i in range(1, n + 1)]
COURSE = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read().partition('\n## The course\n')[2].partition('\n## ')[0]
ROWS = [[cell.strip() for cell in line.strip('|').replace(r'\|', '/').split('|')]
        for line in COURSE.splitlines() if re.match(r'\| \d', line)]
COMMANDS = [code for row in ROWS for code in re.findall('`(.+?)`', row[4])]


@functools.cache
def tree(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return ast.parse(f.read())


def defined(node, names):
    """Whether names, of a class and its method say, are defined in a module or class, one in the other."""
    for child in node.body:
        here = {t.id for t in getattr(child, 'targets', ()) if isinstance(t, ast.Name)} | {getattr(child, 'name', None)}
        if names[0] in here:
            return len(names) == 1 or defined(child, names[1:])
    return False


def settings(script):
    """{name: value} of the settings of a script, as they stand in its source."""
    names = read_settings(os.path.join(ROOT, script))
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.walk(tree(script)) if isinstance(n, ast.Assign)
            and isinstance(n.targets[0], ast.Name) and n.targets[0].id in names and isinstance(n.value, ast.Constant)}


def check_command(words):
    """ValueError or AssertionError for a command with a script, config file, test or setting that does not exist."""
    if words[:2] == ['torchrun', '--standalone']:
        words = ['python', *words[3:]]
    assert words[0] == 'python', words
    if words[1:3] == ['-m', 'pytest']:
        word, tests = words[words.index('-k') + 1], tree(words[3])
        return [f.name for f in tests.body if word in getattr(f, 'name', '')][0]
    script, known = words[1], None
    assert os.path.isfile(os.path.join(ROOT, script)), words
    for word in words[2:]:
        if word.endswith('.py'):
            run_config_file(os.path.join(ROOT, word), settings(script), settings(script))
        elif word.startswith('--'):
            known = known or read_settings(os.path.join(ROOT, script))
            assert re.match(r'--(\w+)=.', word) and word[2:].split('=')[0] in known, words


def commands_in(text):
    """The command lines for python in a text that holds shell commands, loops among them."""
    return re.findall(r'python [^;`#\n]+', re.sub(r'for \w in [^;]*; do', '', text))


def test_all_forty_items_are_there_in_order_each_with_all_its_cells():
    assert [row[0] for row in ROWS] == ITEMS and len(ITEMS) == 40
    assert all(len(row) == 6 and all(row) for row in ROWS)


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[0])
def test_code_and_test_of_a_row_exist(row):
    codes, tests = re.findall('`(.+?)`', row[2]), re.findall('`(.+?)`', row[3])
    assert codes and tests
    for code in codes:
        module, *names = code.split('.')
        assert names and defined(tree(f'{module}.py'), names), code
    for test in tests:
        path, _, name = test.partition('::')
        assert defined(tree(path), [name]), test


def test_commands_name_scripts_config_files_and_settings_that_exist():
    assert len(COMMANDS) == 40
    before = commands_in(''.join(re.findall('(?m)^    .*\n', COURSE)))
    assert len(before) >= 5
    for command in COMMANDS + before:
        check_command(shlex.split(command))


def config_files():
    return sorted(os.path.relpath(os.path.join(folder, name), ROOT) for folder, _, names in
                  os.walk(os.path.join(ROOT, 'config', 'course')) for name in names if name.endswith('.py'))


@pytest.mark.parametrize('path', config_files())
def test_the_commands_in_the_head_of_an_experiment_are_right_and_its_result_is_told(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        head = re.match('(?:#.*\n)+', f.read()).group().replace('\\\n#', '').replace('# ', '')
    commands = commands_in(head)
    assert commands and any(path in command for command in commands) and 'Result' in head
    for command in commands:
        check_command(shlex.split(command))


def test_attention_maps_are_rows_that_sum_to_one_and_never_look_ahead(tmp_path):
    import torch
    from assets.attention import attention_maps
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    maps = attention_maps(GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)), [5, 6, 7, 8])
    assert len(maps) == 2 and all(m.shape == (2, 4, 4) for m in maps)
    for weights in maps:
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4)) and (weights.triu(1) == 0).all()
