"""
Examples for post-training: read from every published JSON format, validated, and put in order.

A file is JSON Lines or a JSON list; data/README.md shows each format. Whatever the format, an
example becomes one of three forms:

    sft           {'messages': [..., assistant]}
    preference    {'messages': [..., user], 'chosen': text, 'rejected': text}
    prompt        {'messages': [..., user]}, and 'response': text if the file has a gold response

Each also has 'prompt', the text of the last user message, and the file's further columns. Some of
these have a meaning here: 'margin' (number), 'op' (text) and 'clean' (bool); with another type they
are the user's own and are removed.

>>> to_example({'question': '2 + 2?', 'answer': '4', 'op': 7}, 'prompt')
{'messages': [{'role': 'user', 'content': '2 + 2?'}], 'prompt': '2 + 2?', 'response': '4'}
"""
import codecs
import contextlib
import glob
import hashlib
import importlib.util
import json
import math
import os
import re

import torch

from configurator import (LARGEST, errors_name_setting, generator_for, printable,
                          write_atomically)
from data.dataset import dataset_folder, is_project_dataset, prepare_if_missing

FORMATS = {
    'sft': 'prompt and response (or completion); question and answer; instruction, input and '
           'output; messages; conversations',
    'preference': 'chosen and rejected, as texts with prompt, question, instruction or messages, '
                  'as lists of messages, or as "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts',
    'prompt': 'prompt (text or messages); question; instruction and input; messages; '
              'conversations; chosen and rejected',
}

# Names of roles in published files, and ours.
ROLES = {
    'system': 'system',
    'user': 'user',
    'human': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
}

# Columns that hold the prompt, with the columns that hold its response.
RESPONSE_COLUMNS = {
    'instruction': ('output',),
    'prompt': ('response', 'completion'),
    'question': ('answer',),
}

# Columns that are converted. All others are kept as they are.
CONVERTED_COLUMNS = {
    'messages', 'conversations', 'system', 'system_prompt', 'history', 'chosen', 'rejected',
    'instruction', 'input', 'output', 'prompt', 'response', 'completion', 'question', 'answer',
}

# They would change the meaning of an example, and the chat formats here cannot express them.
UNSUPPORTED_COLUMNS = ('tools', 'functions', 'images', 'videos', 'audios')
UNSUPPORTED_MESSAGE_KEYS = ('tool_calls', 'tools', 'function_call', 'reasoning_content', 'thinking')

EXAMPLE_FILES = ('.jsonl', '.json')


class DivergentPair(ValueError):
    """A preference pair whose two conversations differ before their last message."""


# ----- Messages


def check_text(value, name):
    """Return the text. ValueError if it is not a string, or contains a lone surrogate."""
    if not isinstance(value, str):
        raise ValueError(f'{name!r} must be text')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{name!r} contains half a character (a lone surrogate)') from error
    return value


def check_texts(row, *keys):
    """Return the texts of these keys of a dict. ValueError if one is missing or is not text."""
    texts = []
    for key in keys:
        if row.get(key) is None:
            raise ValueError(f'missing key {key!r}')
        texts.append(check_text(row[key], key))
    return texts


def drop_nulls(row):
    """The dict without the keys whose value is null: null means absent."""
    return {key: value for key, value in row.items() if value is not None}


def message_of(role, content):
    return {'role': role, 'content': content}


def read_message(message):
    """
    One message in our form: {'role', 'content'} and, for an assistant, perhaps 'weight' (0 or 1).

    Published names are `role` and `content`, or in ShareGPT's format `from` and `value`.
    """
    if not isinstance(message, dict):
        raise ValueError('a message must be an object with role and content')
    message = drop_nulls(message)

    # An empty list or text has no meaning, so it is accepted.
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if message.get(key):
            raise ValueError(f'{key!r} of a message is not supported')

    # both pairs of names
    if 'role' in message:
        role, content = check_texts(message, 'role', 'content')
    elif 'from' in message:
        role, content = check_texts(message, 'from', 'value')
    else:
        raise ValueError("a message has neither 'role' nor 'from'")
    if role not in ROLES:
        names = ', '.join(ROLES)
        raise ValueError(f'role {role!r} is not supported; the roles are {names}')
    result = message_of(ROLES[role], content)

    # weight: whether the loss counts this response (OpenAI's format)
    if 'weight' in message:
        weight = message['weight']
        if weight not in (0, 1):
            raise ValueError(f"'weight' of a message must be 0 or 1; got {weight!r}")
        if result['role'] == 'assistant':
            result['weight'] = int(weight)
        elif weight == 1:
            raise ValueError(f"'weight' 1 of a {result['role']} message is not supported: "
                             'only responses are trained')
    return result


def read_messages(messages, name):
    """The list of messages in our form. ValueError if it is no list, or is empty."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{name!r} must be a list of messages')
    return [read_message(message) for message in messages]


def read_text_or_messages(value, name, role):
    """A text becomes one message of that role; a message or a list of messages is read as it is."""
    if isinstance(value, str):
        return [message_of(role, check_text(value, name))]
    if isinstance(value, dict):
        value = [value]
    return read_messages(value, name)


def check_order(messages):
    """ValueError if a system message is not the first, or no user message precedes a response."""
    seen_user = False
    for i, message in enumerate(messages):
        if message['role'] == 'system' and i > 0:
            raise ValueError('a system message must be the first message')
        if message['role'] == 'assistant' and not seen_user:
            raise ValueError('there is no user message before the first assistant message')
        if message['role'] == 'user':
            seen_user = True


def last_user_text(messages):
    """The text of the last user message: the key `prompt` of an example."""
    texts = [message['content'] for message in messages if message['role'] == 'user']
    return texts[-1]


# ----- Records: what a file contains for one example


def refuse_unsupported(record):
    """ValueError, by name, for a column that would change the meaning of the example."""
    for column in UNSUPPORTED_COLUMNS:
        if record.get(column):
            raise ValueError(f'{column!r} is not supported')
    # A text or another type is a column of the user's own.
    weight = record.get('weight', 1)
    if isinstance(weight, (int, float)) and weight != 1:
        raise ValueError("'weight' of an example is not supported")
    # TRL's KTO format, and that of LLaMA-Factory: true for a good response, false for a bad one
    is_pair = 'chosen' in record or 'rejected' in record
    for column in ('label', 'kto_tag'):
        if isinstance(record.get(column), bool) and not is_pair:
            raise ValueError(f'{column!r} marks unpaired preference data, which is not supported: '
                             'a pair has chosen and rejected')


def own_columns(record):
    """The columns that are kept: all that are not converted, if they have the type used here."""
    columns = {}
    for key, value in record.items():
        if key in CONVERTED_COLUMNS:
            continue
        if key == 'op' and not isinstance(value, str):
            continue
        if key == 'clean' and not isinstance(value, bool):
            continue
        if key == 'margin' and (isinstance(value, bool) or not isinstance(value, (int, float))):
            continue
        columns[key] = value
    return columns


def check_margin(record):
    """ValueError if the margin is a number, but not one that fits into a float32."""
    if not abs(record.get('margin', 0)) <= LARGEST:
        raise ValueError(f'margin must be a finite number of at most {LARGEST}')


def read_history(record):
    """The messages of Alpaca's column history, a list of pairs [prompt, response]."""
    history = record.get('history') or []
    if not isinstance(history, list):
        raise ValueError("'history' must be a list of [prompt, response]")
    messages = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError("'history' must be a list of [prompt, response]")
        messages.append(message_of('user', check_text(turn[0], 'history')))
        messages.append(message_of('assistant', check_text(turn[1], 'history')))
    return messages


def prompt_column(record):
    """The name of the column that holds the prompt, or None."""
    for column in ('messages', 'conversations', *RESPONSE_COLUMNS):
        if column in record:
            return column
    return None


def read_context(record, column):
    """The messages of system, history and the column that holds the prompt (None = no column)."""
    messages = []
    if column is not None:
        messages = read_text_or_messages(record[column], column, 'user')
    if isinstance(record.get(column), str) and record.get('input', '') != '':
        # Alpaca: the instruction, and its input in a paragraph of its own
        [text] = check_texts(record, 'input')
        messages = [message_of('user', f'{record[column]}\n\n{text}')]

    # What comes before the prompt: earlier turns, and a system prompt at the very beginning.
    messages = read_history(record) + messages
    for key in ('system', 'system_prompt'):
        if record.get(key, '') != '':
            [text] = check_texts(record, key)
            system = message_of('system', text)
            if system not in messages[:1]:
                # not repeated in the messages themselves
                messages = [system] + messages
    return messages


def read_response(record, column):
    """The response to the prompt in this column, as a list of messages; [] if there is none."""
    # Messages that end with the user may have their response in a column of its own.
    for name in RESPONSE_COLUMNS.get(column, ('response', 'completion')):
        if name in record:
            return read_text_or_messages(record[name], name, 'assistant')
    return []


def read_conversation(record, kind):
    """All messages of an example for sft, or of a prompt with its gold response if there is one."""
    column = prompt_column(record)
    if column is None:
        raise ValueError("missing key 'prompt'")
    messages = read_context(record, column)
    # A list of messages may already end with the response.
    if messages[-1]['role'] != 'assistant':
        messages += read_response(record, column)
    check_order(messages)
    if kind == 'sft' and messages[-1]['role'] != 'assistant':
        if column in RESPONSE_COLUMNS:
            names = ' or '.join(repr(name) for name in RESPONSE_COLUMNS[column])
            raise ValueError(f'missing key {names}')
        raise ValueError('the last message must be an assistant message')
    return messages


def sft_form(record):
    """{'messages', 'prompt'} of a demonstration. ValueError if nothing in it would be trained."""
    messages = read_conversation(record, 'sft')
    # A response without a weight counts.
    weights = [message.get('weight', 1) for message in messages if message['role'] == 'assistant']
    if not any(weights):
        raise ValueError("every response has 'weight' 0, so there is nothing to train")
    return {'messages': messages, 'prompt': last_user_text(messages)}


def prompt_form(record):
    """{'messages', 'prompt'} of a prompt, and 'response' if there is a gold response."""
    if prompt_column(record) is None and 'chosen' in record:
        pair = preference_form(record)  # such as two transcripts: what they share is the prompt
        return {'messages': pair['messages'], 'prompt': pair['prompt']}
    messages = read_conversation(record, 'prompt')
    # The last response is the gold response; it is not part of the prompt.
    response = None
    if messages[-1]['role'] == 'assistant':
        response = messages.pop()['content']
    if messages[-1]['role'] != 'user':
        raise ValueError('a prompt must end with a user message, or with one response to it')
    form = {'messages': messages, 'prompt': last_user_text(messages)}
    if response is not None:
        form['response'] = response
    return form


# ----- Preference pairs


def read_transcript(text, name):
    """
    The messages of an HH transcript.

    >>> read_transcript('\\n\\nHuman: Hi!\\n\\nAssistant: Hello.', 'chosen')
    [{'role': 'user', 'content': 'Hi!'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    check_text(text, name)
    # With a group in the pattern, split returns: text before, name, text, name, text, ...
    parts = re.split(r'\n\n(Human|Assistant):', text)
    if parts[0].strip() or len(parts) == 1:
        raise ValueError(f'{name!r} is not a transcript: it must begin with "\\n\\nHuman:"; '
                         "a text needs a 'prompt'")
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    messages = []
    for speaker, content in zip(parts[1::2], parts[2::2]):
        messages.append(message_of(roles[speaker], content.strip()))
    return messages


def same_message(a, b):
    return a['role'] == b['role'] and a['content'] == b['content']


def count_shared(a, b):
    """The number of first messages that two conversations share."""
    n = 0
    for x, y in zip(a, b):
        if not same_message(x, y):
            break
        n += 1
    return n


def text_of_response(messages, name):
    """The text of a response, which must be one assistant message."""
    if len(messages) != 1 or messages[0]['role'] != 'assistant':
        raise DivergentPair(f'{name!r} must be one assistant message after the messages that '
                            'chosen and rejected share')
    if messages[0].get('weight', 1) != 1:
        raise ValueError(f"'weight' 0 of {name!r} is not supported")
    return messages[0]['content']


def preference_form(record):
    """{'messages', 'prompt', 'chosen', 'rejected'} of a preference pair."""
    for name in ('chosen', 'rejected'):
        if name not in record:
            raise ValueError(f'missing key {name!r}')
    column = prompt_column(record)
    if 'prompt' in record and not isinstance(record['chosen'], str):
        # UltraFeedback also has the column messages, which repeats the chosen conversation.
        column = 'prompt'
    context = read_context(record, column)

    # 1. Both sides as messages: a text is a response, or without a prompt a whole transcript.
    if column is None and isinstance(record['chosen'], str):
        chosen = read_transcript(record['chosen'], 'chosen')
        rejected = read_transcript(record['rejected'], 'rejected')
    else:
        chosen = read_text_or_messages(record['chosen'], 'chosen', 'assistant')
        rejected = read_text_or_messages(record['rejected'], 'rejected', 'assistant')

    # 2. Whole conversations: the first messages, which both sides share, are the context.
    if chosen[0]['role'] != 'assistant':
        # The last message is always the response, even if both sides are equal.
        n_shared = count_shared(chosen[:-1], rejected[:-1])
        shared = chosen[:n_shared]
        chosen = chosen[n_shared:]
        rejected = rejected[n_shared:]
        for message in context:
            if not any(same_message(message, other) for other in shared):
                raise ValueError('the prompt, system or history contains a message that chosen and '
                                 'rejected do not share')
        context = shared

    # 3. The context ends with the user, and each side is one response to it.
    messages = context
    chosen_text = text_of_response(chosen, 'chosen')
    rejected_text = text_of_response(rejected, 'rejected')
    check_order(messages)
    if not messages or messages[-1]['role'] != 'user':
        raise ValueError('the last message before the responses must be a user message')
    return {
        'messages': messages,
        'prompt': last_user_text(messages),
        'chosen': chosen_text,
        'rejected': rejected_text,
    }


# ----- Files


def to_example(record, kind):
    """
    The example of a record in one of the published formats; kind: 'sft', 'preference' or 'prompt'.

    ValueError if the record has none of the formats of that kind, or if something in it is not
    supported.
    """
    # A bare list of messages is the same as the column messages.
    if isinstance(record, list):
        record = {'messages': record}
    if not isinstance(record, dict):
        raise ValueError('an example must be a JSON object or a list of messages')
    record = drop_nulls(record)
    refuse_unsupported(record)

    # The further columns first, so that they cannot replace what is computed here.
    example = own_columns(record)
    if kind == 'sft':
        example.update(sft_form(record))
    elif kind == 'preference':
        check_margin(example)
        example.update(preference_form(record))
    elif kind == 'prompt':
        example.update(prompt_form(record))
    else:
        raise ValueError(f"kind must be 'sft', 'preference' or 'prompt'; got {kind!r}")
    return example


def parse_list(text):
    """The records of a text that is one JSON list; None if it is not one."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(records, list):
        return None
    # A list of messages is one conversation, in a JSON Lines file of a single line.
    is_conversation = False
    if records and isinstance(records[0], dict):
        is_conversation = 'role' in records[0] or 'from' in records[0]
    if is_conversation:
        return [records]
    return records


def read_records(data, name):
    """
    The records of a file, given as bytes: a list of (where, record, problem).

    where: the file's name with the line or the number of the record. problem: '', or why a line of
    a JSON Lines file could not be read; its record is then None. A byte-order mark is ignored.
    """
    data = data.removeprefix(codecs.BOM_UTF8)

    # 1. A JSON list. A first line that begins with [ can also be a list of messages in JSON Lines.
    if data.lstrip().startswith(b'['):
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f'{name}: not UTF-8 at byte {error.start}') from error
        records = parse_list(text)
        if records is not None:
            found = []
            for number, record in enumerate(records, start=1):
                found.append((f'{name}: record {number}', record, ''))
            return found

    # 2. JSON Lines.
    # Each line is parsed by itself, so that all bad lines can be counted.
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f'{name}:{number}'
        try:
            found.append((where, json.loads(line.decode()), ''))
        except (ValueError, RecursionError) as error:
            found.append((where, None, f'not valid JSON ({error})'))
    return found


def to_examples(records, name, kind, skip_divergent=False):
    """
    The examples of records, as read_records returns them.

    If any record is bad, a ValueError counts all bad ones, shows the first five, and lists the
    formats. skip_divergent: skip the pairs whose conversations differ before their last message,
    and print how many.
    """
    examples = []
    bad = []
    n_divergent = 0
    for where, record, problem in records:
        try:
            if problem:
                raise ValueError(problem)
            examples.append(to_example(record, kind))
        except DivergentPair as error:
            n_divergent += 1
            if not skip_divergent:
                bad.append(f'{where}: {error}')
        except (ValueError, RecursionError) as error:
            bad.append(f'{where}: {error}')
    if bad:
        shown = '; '.join(bad[:5])
        raise ValueError(f'{len(bad)} bad lines of {len(records)}: {shown}. '
                         f'Accepted formats: {FORMATS[kind]} (see data/README.md)')
    if skip_divergent and n_divergent:
        print(printable(f'{name}: skipped {n_divergent:,} pairs that differ before their last '
                        'message'))
    if not examples:
        raise ValueError(f'{name}: no examples')
    return examples


def read_examples(path, kind):
    """
    Read the examples of a file; kind: 'sft', 'preference' or 'prompt'. See the top of this file.

    ValueError, with file, line and the accepted formats, if any line is bad or there is no example.
    """
    with open(path, 'rb') as file:
        data = file.read()
    return to_examples(read_records(data, path), path, kind)


def find_examples(folder, split):
    """The path of folder/<split>.jsonl or .json, or None."""
    for ending in EXAMPLE_FILES:
        path = os.path.join(folder, split + ending)
        if os.path.exists(path):
            return path
    return None


def load_examples(dataset, split, kind, default=None):
    """
    The examples of data/<dataset>/<split>.jsonl (or .json), see read_examples.

    If the file does not exist, `default` is returned, or a ValueError raised if there is none.
    Without a default, a dataset that has no file of examples at all is prepared first; one that has
    any stays as it is, because the files may be the user's own. If it has no file of prompts, they
    are those of its demonstrations or, if it has none of these either, of its preference pairs.
    """
    folder = dataset_folder(dataset)

    def is_ready():
        # any file: one file of the user's own must not be replaced
        files = glob.glob(os.path.join(glob.escape(folder), '*.jsonl'))
        return len(files) > 0 or find_examples(folder, split) is not None

    if default is None:
        prepare_if_missing(dataset, is_ready)
    path = find_examples(folder, split)
    if path is None and default is not None:
        return default
    if path is None and kind == 'prompt':
        # Demonstrations and preference pairs contain prompts too.
        for other in ('sft', 'pref'):
            path = path or find_examples(folder, split.replace('prompts', other))
        if path is not None:
            print(printable(f'{split}: the prompts of {path}'), flush=True)
    if path is None:
        script = os.path.join(folder, 'prepare.py')
        message = f'{os.path.join(folder, split)}.jsonl: no such file'
        if os.path.exists(script):
            message += f'; {script} did not make it, or was interrupted'
        raise ValueError(message)
    return read_examples(path, kind)


def load_gold(dataset, function=''):
    """
    The checking function(prompt, response) -> number of a dataset: 1 for a correct response, 0 for
    a wrong one. `function` is FILE.py:function, or '' for the function gold of the dataset's
    prepare.py. None if there is neither.
    """
    if function:
        return load_function(function)
    # Only the project's own datasets, named by a plain folder name, may be run.
    script = os.path.join(dataset_folder(dataset), 'prepare.py')
    if not is_project_dataset(dataset) or not os.path.exists(script):
        return None
    if not hasattr(load_module(script), 'gold'):
        return None
    return load_function(f'{script}:gold')


def load_module(path):
    """The module of a Python file, which is run."""
    name = os.path.basename(path).removesuffix('.py')
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_function(file_and_name):
    """
    The function that FILE.py:function names, for use as a reward. It takes (prompt, response), two
    texts, and returns a number or a bool, or a tuple that begins with one. The file is run, so name
    only one that you trust.
    """
    path, _, name = file_and_name.rpartition(':')
    if not os.path.isfile(path):
        raise ValueError(f'{file_and_name}: no file {path!r}; a reward is FILE.py:function')
    function = getattr(load_module(path), name, None)
    if not callable(function):
        raise ValueError(f'{path} has no function {name!r}')

    def call(prompt, response):
        example = f'prompt {prompt!r} and response {response!r}'
        try:
            result = function(prompt, response)
        except Exception as error:
            raise ValueError(f'{path}: {name} failed for {example}: {type(error).__name__}: '
                             f'{error}') from error
        value = result[0] if isinstance(result, tuple) else result
        number = math.nan
        if not isinstance(value, str):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = float(value)  # an int, a float, a bool, or a scalar of numpy or torch
        if not math.isfinite(number):
            raise ValueError(f'{path}: {name} must return a number; got {result!r} for {example}')
        return number
    return call


# ----- Write: for the scripts that prepare a dataset


def held_out_prompts(examples, name):
    """
    The prompts of the validation split: a tenth of all different prompts, those with the lowest
    hashes. So no prompt is in both splits, and the same prompts are always split in the same way.

    ValueError if all examples have the same prompt, so that one split would be empty.
    """
    prompts = {example['prompt'] for example in examples}
    if len(prompts) < 2:
        raise ValueError(f'{name}: two different prompts are needed, one for training and one for '
                         f'validation; there are {len(prompts)} in {len(examples):,} examples')
    # A hash orders the prompts independently of the order of the file.
    ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    n_held_out = max(1, len(ordered) // 10)
    return set(ordered[:n_held_out])


def to_record(example):
    """What is written for an example: its form, with the text alone for a single user message."""
    messages = example['messages']
    roles = [message['role'] for message in messages]
    has_weight = any('weight' in message for message in messages)
    if roles == ['user']:
        record = {'prompt': messages[0]['content']}
    elif roles == ['user', 'assistant'] and not has_weight:
        record = {'prompt': messages[0]['content'], 'response': messages[1]['content']}
    else:
        record = {'messages': messages}
    for key in ('response', 'chosen', 'rejected', 'margin'):
        if key in example:
            record[key] = example[key]
    return record


def split_examples(examples, held_out):
    """(train, val): the examples with another prompt, and those with a held-out prompt."""
    train = []
    val = []
    for example in examples:
        if example['prompt'] in held_out:
            val.append(example)
        else:
            train.append(example)
    return train, val


def has_empty_text(example):
    """Whether a message or a response is empty: nothing can be learned from such an example."""
    texts = [message['content'] for message in example['messages']]
    for key in ('chosen', 'rejected'):
        if key in example:
            texts.append(example[key])
    return any(text.strip() == '' for text in texts)


def write_examples(folder, files):
    """
    Write each of files, {name: examples}, as folder/<name>.jsonl.

    Without examples, such a file is removed: nothing is left of what was prepared before.
    """
    with errors_name_setting('out', folder):
        os.makedirs(folder, exist_ok=True)
    for name, examples in files.items():
        path = os.path.join(folder, f'{name}.jsonl')
        # of an earlier preparation, from another file
        if not examples and os.path.exists(path):
            os.remove(path)
        if not examples:
            continue
        with errors_name_setting('out', folder), write_atomically(path) as file:
            for example in examples:
                line = json.dumps(to_record(example), ensure_ascii=False) + '\n'
                file.write(line.encode())
        print(printable(f'{path}: {len(examples):,} lines'))


# ----- Order


def endless_order(n, first, count, *seed):
    """
    `count` indices, from position `first` on, of an endless sequence of permutations of 0..n-1.

    A pure function of its arguments, so that a resumed run continues with the same examples.

    >>> endless_order(3, 0, 6, 7, 'batches')    # two epochs, seed 7
    [2, 0, 1, 2, 0, 1]
    >>> endless_order(3, 2, 2, 7, 'batches')    # positions 2 and 3 of the same sequence
    [1, 2]
    """
    first_epoch = first // n
    last_epoch = (first + count - 1) // n
    indices = []
    for epoch in range(first_epoch, last_epoch + 1):
        order = torch.randperm(n, generator=generator_for(*seed, epoch))
        # the part of this epoch that is between first and first + count
        start = max(0, first - epoch * n)
        stop = first + count - epoch * n
        indices += order[start:stop].tolist()
    return indices


def grouped_order(n, step, count, groups, *seed):
    """
    The `count` indices of one step, for examples that are numbered by length.

    The indices of `groups` consecutive steps are drawn together, in the order of endless_order,
    sorted by length, and divided among these steps. So the examples of a step have similar lengths
    and need little padding.
    """
    first_step = step // groups * groups
    drawn = sorted(endless_order(n, first_step * count, groups * count, *seed))
    start = step % groups * count
    return drawn[start:start + count]
