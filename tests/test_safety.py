"""
Protection from foreign files, and other systems: the source has no way to run foreign code, mutated
inputs do no harm, and everything trains where fcntl and resource do not exist.
"""
import ast
import glob
import json
import os
import re
import sys

import pytest

from conftest import CPU, ROOT, TINY, flags, start

# -----------------------------------------------------------------------------
# The source

PICKLES = {'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}
# What runs a text, and the only function that may use it.
RUNS_TEXT = {
    'eval': None,
    'exec': 'configurator.run_config_file',
    'compile': 'configurator.run_config_file',
    'importlib': 'data.examples.load_module',
    '__import__': None,
    'os.system': None,
    'os.popen': None,
}
# Arguments, and the only value that each may have.
ARGUMENTS = {
    'weights_only': True,
    'allow_pickle': False,
    'shell': False,
    'trust_remote_code': False,
}
# Functions that read or write text, and the position of the encoding among their arguments.
TEXT_FUNCTIONS = {'open': 3, 'read_text': 0, 'write_text': 1}


def dotted_name(node):
    """'os.system' of the syntax tree of os.system; '' if a node is no such name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted_name(node.value):
        return f'{dotted_name(node.value)}.{node.attr}'
    return ''


def is_text_without_encoding(call):
    """Whether a call opens a file as text, and does not name its encoding."""
    name = dotted_name(call.func) or getattr(call.func, 'attr', '')
    name = name.split('.')[-1]
    if name not in TEXT_FUNCTIONS or dotted_name(call.func) in ('os.open', 'webbrowser.open'):
        return False
    mode = [keyword.value for keyword in call.keywords if keyword.arg == 'mode']
    if name == 'open' and isinstance(call.func, ast.Name):
        mode += call.args[1:2]
    if name == 'open' and any('b' in ast.unparse(value) for value in mode):
        return False
    has_encoding = any(keyword.arg == 'encoding' for keyword in call.keywords)
    return not has_encoding and len(call.args) <= TEXT_FUNCTIONS[name]


def problems_of(source, module):
    """What is forbidden in the text of a module, as a list of texts."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        where = f'{module}.{function}'
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            if name.split('.')[0] in PICKLES:
                found.append(f'{where} imports {name}')
        if isinstance(node, ast.Call):
            name = dotted_name(node.func)
            names.append(name)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            for argument, allowed in ARGUMENTS.items():
                value = given.get(argument, ast.Constant(allowed))
                if not isinstance(value, ast.Constant) or value.value is not allowed:
                    found.append(f'{where} has {argument}={ast.unparse(value)}')
            if name == 'torch.load' and 'weights_only' not in given:
                found.append(f'{where} has torch.load without weights_only=True')
            if is_text_without_encoding(node):
                found.append(f'{where} has {ast.unparse(node)} without an encoding')
        for name in names:
            for forbidden, allowed_in in RUNS_TEXT.items():
                is_used = name == forbidden or name.startswith(f'{forbidden}.')
                is_import = isinstance(node, ast.Import)  # it may stand at the top of the file
                if is_used and where != allowed_in and not (is_import and allowed_in
                                                            and allowed_in.startswith(module)):
                    found.append(f'{where} has {name}')
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), '')
    return found


@pytest.mark.parametrize('line', [
    'import pickle', 'from pickle import loads', 'import os, dill', 'torch.load(path)',
    'torch.load(path, weights_only=False)', 'torch.load(path, weights_only=flag)',
    'np.load(path, allow_pickle=True)', 'load(name, trust_remote_code=True)',
    'subprocess.run(command, shell=True)', 'eval("1")', 'exec("1")', 'compile("1", "", "exec")',
    'importlib.import_module(name)', '__import__(name)', 'os.system("ls")', 'open(path)',
    'open(path, "w")', 'open(path, mode="r")', 'Path(path).open()', 'path.read_text()',
    'path.write_text(text)'])
def test_the_scan_finds_what_is_forbidden(line):
    assert problems_of(line, 'module')
    assert problems_of(f'def function():\n    return [\n        0]\nif x:\n    {line}', 'module')


@pytest.mark.parametrize('line', [
    'model.eval()', 're.compile("a")', 'torch.compile(model)', 'os.open(path, 0)',
    'torch.load(path, weights_only=True)', 'open(path, "rb")', 'open(path, mode="wb")',
    'open(path, encoding="utf-8")', 'open(path, "w", encoding="utf-8")', 'path.read_text("utf-8")',
    'path.write_text(text, encoding="utf-8")', 'subprocess.run([program])'])
def test_the_scan_accepts_what_is_allowed(line):
    assert problems_of(line, 'module') == []


def test_the_source_runs_no_foreign_code_and_names_every_encoding():
    problems = []
    paths = []
    for pattern in ('*.py', 'assets/*.py', 'config/**/*.py', 'data/*.py', 'data/*/*.py'):
        paths += glob.glob(os.path.join(ROOT, pattern), recursive=True)
    assert len(paths) > 40
    for path in paths:
        module = os.path.relpath(path, ROOT).removesuffix('.py').replace(os.sep, '.')
        with open(path, encoding='utf-8') as f:
            problems += problems_of(f.read(), module)
    assert problems == []


# -----------------------------------------------------------------------------
# Mutated inputs

@pytest.mark.skipif(sys.platform != 'linux', reason='fuzz.py limits processes as Linux can')
def test_no_input_of_a_fixed_sample_does_harm():
    process = start('tests/fuzz.py', '--count=200')
    stdout, stderr = process.communicate(timeout=1800)  # it takes half a minute of one free core
    assert process.returncode == 0, stdout + stderr
    assert re.search(r'^200 inputs, 0 with faults', stdout, re.MULTILINE), stdout + stderr


# -----------------------------------------------------------------------------
# Other systems

# Runs scripts one after another, where two modules of Unix cannot be imported, nor matplotlib.
WITHOUT_UNIX = '''
import json, runpy, sys
for module in ('fcntl', 'resource', 'matplotlib'):
    sys.modules[module] = None
for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name='__main__')
'''


def test_all_stages_train_save_and_resume_without_fcntl_and_resource(
        dataset, letters_data, small_base, tmp_path):
    small = dict(CPU, max_iters=2, eval_interval=1, batch_size=4, log_interval=1)
    few = dict(small, dataset=letters_data, max_new_tokens=4)
    prompts = dict(eval_prompts=2, test_prompts=2, test_draws=1)
    commands = [
        ['train.py', *flags(TINY, **small, dataset=dataset, out_dir=tmp_path / 'train')],
        ['sft.py', *flags(few, **prompts, init_from=small_base, out_dir=tmp_path / 'sft')],
        ['reward.py', *flags(few, init_from=tmp_path / 'sft', normalize_prompts=4,
                             out_dir=tmp_path / 'reward')],
        ['ppo.py', *flags(few, **prompts, init_from=tmp_path / 'sft', minibatch_size=4,
                          reward_model=tmp_path / 'reward', out_dir=tmp_path / 'ppo')]]
    for stage in ('train', 'sft', 'reward', 'ppo'):
        commands.append([f'{stage}.py', *flags(init_from='resume', max_iters=3,
                                               out_dir=tmp_path / stage)])
    process = start('-c', WITHOUT_UNIX, json.dumps(commands))
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stdout + stderr
    finals = re.findall(r'^final: .*', stdout, re.MULTILINE)
    assert len(finals) == 8
    assert all('steps 2' in line for line in finals[:4])
    assert all('steps 3' in line for line in finals[4:])
    assert 'peak_memory_mb' not in stdout  # which these systems do not tell
