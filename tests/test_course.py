"""
The course, the READMEs in config/ and tests/ and the headers of the config files are correct: the
code, files, scripts, settings and metrics that they name exist, the lines that they quote are in
the source, and their examples print what they show. The commands are checked but not run, except
for a few; tests/run_course.py runs them all.
"""
import ast
import doctest
import functools
import os
import re
import shlex
import sys

import pytest

import run_course
from configurator import check_setting, parse_value, read_settings, run_config_file
from conftest import ROOT, call, ok, story
from run_course import CHAPTERS, code_blocks, split_chapter

COURSE = 'config/course/README.md'
WORDPLAY = 'config/wordplay/README.md'
READMES = ['README.md', 'data/README.md', COURSE, WORDPLAY, 'config/smollm2/README.md',
           'tests/README.md', *CHAPTERS]

# The number of items in each of the eight chapters of the course.
ITEMS_PER_PART = (7, 6, 6, 5, 3, 4, 4, 5)

# The parts of each item, in this order.
PARTS_OF_ITEM = ('Formula', 'Code', 'Example', 'Run', 'Exercise')

# Items whose commands the tests run; they need no network.
ITEMS_TO_RUN = ['2.4', '2.5']

# Stands for a file of the reader's own in the header of config/nanogpt.py.
PLACEHOLDER = 'THEIR_CONFIG.py'


# -----------------------------------------------------------------------------
# Read the texts


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def exists(path):
    return os.path.isfile(os.path.join(ROOT, path))


def table_rows(text, first_cell):
    """The cells of each table row whose first cell matches a regular expression."""
    rows = []
    for line in text.splitlines():
        if line.startswith('|'):
            cells = [cell.strip() for cell in line.strip('|').split('|')]
            if re.match(first_cell, cells[0]):
                rows.append(cells)
    return rows


def in_backticks(text):
    return re.findall('`(.+?)`', text)


def commands_in(text):
    """The commands in lines of shell: those that start with python or torchrun."""
    text = text.replace('\\\n', ' ')                           # a continued line
    return re.findall(r'\b(?:python|torchrun) (?:"[^"\n]*"|[^";`#|>\n])+', text)


def indented_lines(text):
    """The lines of Markdown's indented code blocks."""
    return ''.join(re.findall('(?m)^    .*\n', text))


def commands_of(path):
    """The commands in the code blocks of a Markdown file."""
    text = read(path)
    shell = [content for _, content in code_blocks(text, 'sh')]
    return commands_in(indented_lines(text) + ''.join(shell))


def links_of(path):
    """[(text, path of the file, anchor)] of the links to files in a Markdown file."""
    links = re.findall(r'\[([^]\n]*)\]\(([^)#\s]*)#?([^)\s]*)\)', read(path))
    folder = os.path.dirname(path)
    return [(text, os.path.normpath(os.path.join(folder, target)) if target else path, anchor)
            for text, target, anchor in links if not target.startswith('http')]


def header(path):
    """The comment at the top of a config file, without its comment signs."""
    comment = re.match('(?:#.*\n)+', read(path)).group()
    return re.sub('(?m)^# ?', '', comment)


def config_files():
    paths = []
    for folder, _, names in os.walk(os.path.join(ROOT, 'config')):
        for name in names:
            if name.endswith('.py'):
                paths.append(os.path.relpath(os.path.join(folder, name), ROOT))
    return sorted(paths)


EXPERIMENTS = [path for path in config_files() if path.count('/') == 2]


# -----------------------------------------------------------------------------
# Look names up in the sources


@functools.cache
def tree(path):
    return ast.parse(read(path))


def names_of(node):
    """The names that a statement defines: a class, a function, or assigned variables."""
    names = [target.id for target in getattr(node, 'targets', []) if isinstance(target, ast.Name)]
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        names.append(node.name)
    return names


def is_defined(node, names):
    """Whether a module defines names[0], this class defines names[1], and so on."""
    for child in node.body:
        if names[0] in names_of(child):
            return len(names) == 1 or is_defined(child, names[1:])
    return False


@functools.cache
def defaults_of(script):
    """{name: default} of a script's settings, from its source."""
    names = read_settings(os.path.join(ROOT, script))
    defaults = {}
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in names and name not in defaults:
                defaults[name] = ast.literal_eval(node.value)
    return defaults


def anchors_of(path):
    """The anchors that GitHub gives to the headings of a Markdown file."""
    anchors = set()
    for title in re.findall('(?m)^#+ (.*)', read(path)):
        words = re.sub(r'[^\w\- ]', '', title.lower())
        anchors.add(words.replace(' ', '-'))
    return anchors


def find_lines(lines, source, start, indent):
    """The line of the source after the first place, from `start` on, where `lines` stand, all
    indented by `indent`; None if there is none."""
    wanted = [indent + line if line else '' for line in lines]
    for i in range(start, len(source) - len(wanted) + 1):
        if source[i:i + len(wanted)] == wanted:
            return i + len(wanted)
    return None


def is_quoted_from(quote, source):
    """
    Whether a quote stands in the source, apart from its indentation. A line `...` in the quote
    stands for lines that are left out.

    >>> source = 'if a:\\n    b = 1\\n    c = 2\\n    d = 3\\n'
    >>> is_quoted_from('b = 1\\n...\\nd = 3\\n', source), is_quoted_from('b = 1\\nd = 3\\n', source)
    (True, False)
    """
    pieces = re.split(r'(?m)^ *\.\.\.\n', quote)
    source = source.splitlines()
    for indent in range(0, 24, 4):
        end = 0
        for piece in pieces:
            if end is not None:
                end = find_lines(piece.splitlines(), source, end, ' ' * indent)
        if end is not None:
            return True
    return False


def check_command(command):
    """ValueError or AssertionError for a command whose script, config file, test file or setting
    does not exist, or whose value has the wrong type."""
    # 1. A run on several ranks has the arguments of a run on one.
    words = shlex.split(command)
    if words[:2] == ['torchrun', '--standalone']:
        words = ['python', *words[3:]]
    assert words[0] == 'python', command
    # 2. Test files.
    if words[1:3] == ['-m', 'pytest']:
        assert all(exists(word) for word in words[3:] if word.endswith('.py')), command
        return
    # 3. A script; benchmarks have no settings.
    script = words[1]
    assert exists(script), command
    # A picture of the project is not overwritten by a reader who tries the command.
    assert not any(re.search(r'\bassets/.*\.png', word) for word in words[2:]), command
    if script.startswith('tests/'):
        return
    # 4. Its config files and settings. Folders, which assets/draw.py takes, need not exist yet.
    defaults = defaults_of(script)
    for word in words[2:]:
        if not word.startswith('--') and word.endswith('.py') and word != PLACEHOLDER:
            found = run_config_file(os.path.join(ROOT, word), defaults, defaults)
            assert found, f'{word} sets nothing'
        elif word.startswith('--'):
            key, equals, text = word.removeprefix('--').partition('=')
            assert equals and text, command
            assert key in defaults, f'{command}: {script} has no setting {key}'
            # The value of a loop's variable is unknown.
            if '$' not in text:
                check_setting(word, key, parse_value(text, defaults[key]), defaults)


# -----------------------------------------------------------------------------
# The course


def expected_items(chapter):
    """The items of a chapter: ['1.1', '1.2', ...]."""
    return [f'{chapter}.{i + 1}' for i in range(ITEMS_PER_PART[chapter - 1])]


def number_of(path):
    """The number of a chapter, from the name of its file."""
    return int(os.path.basename(path)[0])


def test_the_course_has_forty_items_in_eight_chapters():
    assert sum(ITEMS_PER_PART) == 40
    assert [number_of(path) for path in CHAPTERS] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize('path', CHAPTERS)
def test_a_chapter_has_its_items_in_order_each_with_its_parts(path):
    items = split_chapter(read(path))
    assert list(items) == ['', *expected_items(number_of(path))]
    for item, text in items.items():
        if item:
            assert tuple(re.findall(r'(?m)^\*\*(\w+)\.\*\*', text)) == PARTS_OF_ITEM, item
            parts = dict(zip(PARTS_OF_ITEM, re.split(r'(?m)^\*\*\w+\.\*\*', text)[1:]))
            assert re.search(r'\$\$|```math', parts['Formula']), item
            assert code_blocks(parts['Code'], 'python'), item
            assert '>>> ' in parts['Example'], item
            assert code_blocks(parts['Run'], 'sh'), item
            assert '<details><summary>' in parts['Exercise'], item


@pytest.mark.parametrize('path', CHAPTERS)
def test_the_contents_page_links_to_each_item(path):
    anchors = {anchor for _, target, anchor in links_of(COURSE) if target == path}
    for item in expected_items(number_of(path)):
        assert any(anchor.startswith(item.replace('.', '') + '-') for anchor in anchors), item


@pytest.mark.parametrize('path', CHAPTERS)
def test_the_lines_that_a_chapter_quotes_stand_in_the_source(path):
    quotes = [(rest.removeprefix('from='), content)
              for rest, content in code_blocks(read(path), 'python') if rest.startswith('from=')]
    assert quotes
    for source, quote in quotes:
        assert is_quoted_from(quote, read(source)), f'not in {source}:\n{quote}'


@pytest.mark.parametrize('path', CHAPTERS)
def test_the_examples_of_a_chapter_print_what_they_show(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = [content for rest, content in code_blocks(read(path), 'python') if not rest]
    # An empty line ends the output of the last example of a block.
    parsed = doctest.DocTestParser().get_doctest('\n\n'.join(examples), {}, path, path, 0)
    report = []
    results = doctest.DocTestRunner().run(parsed, out=report.append)
    assert results.attempted > 0 and results.failed == 0, ''.join(report)


def test_the_examples_in_the_docstrings_of_the_tests_print_what_they_show():
    for module in (sys.modules[__name__], run_course):
        results = doctest.testmod(module)
        assert results.attempted > 0 and results.failed == 0


def test_selected_items_are_run_after_the_start_of_their_chapter():
    every_block = run_course.select_blocks([])
    first = run_course.select_blocks(['1'])
    assert first and every_block[:len(first)] == first
    assert {item for item, _ in run_course.select_blocks(['1.3'])} - {'start of chapter 1'} == {
        '1.3'}
    with pytest.raises(ValueError, match='no chapter or item 1.9, 9'):
        run_course.select_blocks(['1.3', '9', '1.9'])


def test_commands_of_the_course_run_in_a_shortened_form(tmp_path):
    copy = tmp_path / 'project'
    run_course.copy_project(copy)
    # A small text in place of the plays, which would be downloaded.
    text = tmp_path / 'story.txt'
    text.write_text(story(), encoding='utf-8')
    ok(call('data/text/prepare.py', f'--input={text}', f'--out={copy}/data/shakespeare'))
    environment = run_course.make_python(tmp_path / 'bin')
    for item, block in run_course.select_blocks(ITEMS_TO_RUN):
        status, output = run_course.run_block(block, copy, environment)
        assert status == 0, f'{item}: {block}{output}'
    status, output = run_course.run_block('python train.py --max_iter=5', copy, environment)
    assert status == 2 and 'max_iters' in output


# -----------------------------------------------------------------------------
# All READMEs and config files


@pytest.mark.parametrize('path', READMES)
def test_the_commands_of_a_readme_are_valid(path):
    commands = commands_of(path)
    assert commands
    for command in commands:
        check_command(command)


def test_no_script_writes_to_a_tracked_picture_unless_it_is_named():
    scripts = [f'assets/{name}' for name in os.listdir(os.path.join(ROOT, 'assets'))]
    scripts += [f'tests/{name}' for name in os.listdir(os.path.join(ROOT, 'tests'))]
    for script in scripts:
        if script.endswith('.py'):
            assert not re.search(r"'assets/\w+\.png'", read(script)), script


@pytest.mark.parametrize('path', READMES)
def test_the_files_and_functions_that_a_readme_links_to_exist(path):
    links = links_of(path)
    assert links or path == 'data/README.md'
    for text, target, anchor in links:
        assert exists(target), target
        if target.endswith('.md') and anchor:
            assert anchor in anchors_of(target), (target, anchor)
        # The text of a link to a source may be code, such as `Attention.forward`.
        code = re.fullmatch(r'`([\w.]+)`', text)
        if target.endswith('.py') and code and not code[1].endswith('.py'):
            assert is_defined(tree(target), code[1].split('.')), (target, text)


@pytest.mark.parametrize('path', config_files())
def test_the_commands_in_the_header_of_a_config_file_are_valid(path):
    commands = commands_in(header(path))
    assert any(path in command for command in commands)
    for command in commands:
        check_command(command)


@pytest.mark.parametrize('path', EXPERIMENTS)
def test_the_header_of_an_experiment_reports_its_result(path):
    assert 'Result' in header(path)


@pytest.mark.parametrize('path', READMES + config_files())
def test_the_python_files_that_a_text_names_exist(path):
    text = header(path) if path.endswith('.py') else read(path)
    for name in re.findall(r'\b(?:config|tests|assets|data)/[\w/]+\.py\b', text):
        assert exists(name), name


def test_every_test_file_is_in_the_table_of_test_files():
    names = {row[0].strip('`') for row in table_rows(read('tests/README.md'), '`test_')}
    folder = os.path.join(ROOT, 'tests')
    assert names == {name for name in os.listdir(folder) if re.match(r'test_\w+\.py', name)}


# -----------------------------------------------------------------------------
# The glossary of metrics


def is_metrics(node):
    names = ('metrics', 'mb_metrics', 'figures', 'update')
    return isinstance(node, ast.Name) and node.id in names


def dict_keys(node):
    """The keys of a dict that is written out, also as part of an expression or a comprehension."""
    keys = []
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            keys += part.keys
        if isinstance(part, ast.DictComp):
            keys.append(part.key)
    return keys


def keys_in_loop(loop):
    """The keys metrics[name] that a loop over written-out names sets: for name in ('lr', ...)."""
    variables = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    for node in ast.walk(loop):
        is_key = isinstance(node, ast.Subscript) and is_metrics(node.value)
        if is_key and isinstance(node.slice, ast.Name) and node.slice.id in variables:
            constants = [part for part in ast.walk(loop.iter) if isinstance(part, ast.Constant)]
            return [part for part in constants if isinstance(part.value, str)]
    return []


def logged_names(path):
    """The metrics of a script, as regular expressions: the keys of the dicts that it calls metrics,
    figures or update, and of those that it passes to logger.log and logger.final."""
    keys = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if is_metrics(target):                             # metrics = {...}
                keys += dict_keys(node.value)
            if isinstance(target, ast.Subscript) and is_metrics(target.value):
                keys.append(target.slice)                      # metrics['loss'] = ...
        if isinstance(node, ast.For):
            keys += keys_in_loop(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ('log', 'final'):             # logger.log(step, {...})
                for argument in node.args:
                    keys += dict_keys(argument)
    names = set()
    for key in keys:
        if isinstance(key, ast.Constant):
            names.add(re.escape(key.value))
        if isinstance(key, ast.JoinedStr):                     # f'exact_match/{op}'
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else r'\w+'
                     for part in key.values]
            names.add(''.join(parts))
    return names


def explained_metrics():
    """The metrics in the tables of the glossary."""
    glossary = read(WORDPLAY).partition('\n## All logged metrics\n')[2]
    explained = set()
    for row in table_rows(glossary, '`'):
        explained.update(in_backticks(row[0]))
    return explained


@pytest.mark.parametrize('path, some', [
    ('train.py', ['mfu', 'muon_lr', 'skipped', 'val_loss']),
    ('model.py', ['moe_entropy', r'moe/layer_\w+/expert_\w+']),
    ('sft.py', ['response_loss', 'skipped', r'exact_match/\w+']),
    ('reward.py', ['head_lr', 'auc', r'margin/\w+']),
    ('ppo.py', ['gain_lr', 'critic_lr', 'skipped', 'val/clipfrac', r'eval/\w+', r'\w+_before'])])
def test_every_logged_metric_is_in_the_glossary(path, some):
    names = logged_names(path)
    assert set(some) <= names
    explained = explained_metrics()
    for name in names:
        assert any(re.fullmatch(name, metric) for metric in explained), name


def test_the_figures_that_are_logged_before_and_after_ppo_are_in_the_glossary():
    explained = explained_metrics()
    figures = ('exact_match', 'exact_match_sampled', 'ended', 'score', 'gold')
    for name in figures:
        assert {name, f'{name}_before'} <= explained
    assert {'kl', 'kl_minimum'} <= explained
