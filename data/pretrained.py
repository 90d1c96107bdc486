"""
Where a run's model comes from, and how it leaves again.

- load_pretrained and save_pretrained read and write a Hugging Face folder.
- load_model returns the model and the tokenizer that --init_from names: 'scratch', a run folder, a
  Hugging Face folder, or a name on huggingface.co.
- load_chat_model and load_reward_model do this for the stages after pretraining.

Only JSON and safetensors are read from a Hugging Face folder, so nothing in it is executed.

As a script, this file exports a run to a folder that transformers and other tools open:

    python data/pretrained.py --init_from=out/sft --out=out/sft-export
"""
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to find these when run as a script
from bpe import SPECIAL_TOKENS, Tokenizer, chat_format, chat_template
from configurator import (configure, errors_name_setting, is_finite_number, is_rank_0,
                          load_checkpoint, printable, seed_for, write_atomically)
from model import GPT, GPTConfig, RewardModel

# ----- The families of published models

# A family is named by `model_type` in config.json. It fixes some flags of GPTConfig, and its
# config.json holds the others, under its own keys. A key may be missing; then the value is the one
# given here, which is also the default of transformers, or else 0.

# arXiv 2302.13971
LLAMA_FLAGS = {
    'norm': 'rmsnorm',
    'norm_eps': 1e-6,
    'pos': 'rope',
    'rope_base': 10000.0,
    'mlp': 'swiglu',
    'bias': False,
    'qkv_bias': False,
    'qk_norm': False,
    'window': 0,
    'n_expert': 0,
    'tie_weights': False,
}
# Radford et al. 2019, Language Models are Unsupervised Multitask Learners
GPT2_FLAGS = {
    'norm': 'layernorm',
    'norm_eps': 1e-5,
    'pos': 'learned',
    'mlp': 'gelu_tanh',
    'bias': True,
    'qkv_bias': False,
    'qk_norm': False,
    'window': 0,
    'n_expert': 0,
    'tie_weights': True,
}
FLAGS = {
    'gpt2': GPT2_FLAGS,
    'llama': LLAMA_FLAGS,
    # arXiv 2407.10671 and 2505.09388
    'qwen2': LLAMA_FLAGS | {'qkv_bias': True},
    'qwen3': LLAMA_FLAGS | {'qk_norm': True},
    # arXiv 2310.06825 and 2401.04088
    'mistral': LLAMA_FLAGS | {'window': 4096},
    'mixtral': LLAMA_FLAGS | {'norm_eps': 1e-5, 'rope_base': 1e6},
}

# {our flag: the key in the family's config.json}
LLAMA_KEYS = {
    'vocab_size': 'vocab_size',
    'block_size': 'max_position_embeddings',
    'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads',
    'n_kv_head': 'num_key_value_heads',
    'head_dim': 'head_dim',
    'n_embd': 'hidden_size',
    'n_hidden': 'intermediate_size',
    'norm_eps': 'rms_norm_eps',
    'tie_weights': 'tie_word_embeddings',
}
GPT2_KEYS = {
    'vocab_size': 'vocab_size',
    'block_size': 'n_positions',
    'n_layer': 'n_layer',
    'n_head': 'n_head',
    'n_embd': 'n_embd',
    'n_hidden': 'n_inner',
    'norm_eps': 'layer_norm_epsilon',
    'tie_weights': 'tie_word_embeddings',
}
MISTRAL_KEYS = LLAMA_KEYS | {'window': 'sliding_window'}
MIXTRAL_KEYS = MISTRAL_KEYS | {
    'n_expert': 'num_local_experts',
    'n_expert_active': 'num_experts_per_tok',
}
KEYS = {
    'gpt2': GPT2_KEYS,
    'llama': LLAMA_KEYS,
    'qwen2': LLAMA_KEYS,
    'qwen3': LLAMA_KEYS,
    'mistral': MISTRAL_KEYS,
    'mixtral': MIXTRAL_KEYS,
}

# The published forward pass of a family reads the keys above, those of RoPE (see rope_flags) and
# those in its CHOICES, for which this program computes only the values listed here.
LLAMA_CHOICES = {
    'hidden_act': ('silu', 'swish'),
    'attention_bias': (False, None),
    'mlp_bias': (False, None),
    # Qwen's windows, which only some of its layers would have
    'use_sliding_window': (False, None),
    'use_mrope': (False, None),
    'rope_interleaved': (False, None),
    'is_encoder_decoder': (False, None),
}
GPT2_CHOICES = {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh', 'gelu'),
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False, None),
    'add_cross_attention': (False, None),
    'is_encoder_decoder': (False, None),
}
# No family here reads the following keys. A config.json that sets one describes a variant that is
# computed by other code, so the key is refused unless it has a value that switches it off.
SWITCHES = (
    'auto_map', 'quantization_config', 'alibi', 'parallel_attn', 'use_parallel_residual',
    'use_qk_norm', 'qk_norm', 'qk_layernorm', 'sandwich_norm', 'clip_qkv', 'no_rope_layers',
    'logit_softcap', 'attn_logit_softcapping', 'final_logit_softcapping', 'query_pre_attn_scalar',
)
# These multiply some result, so 1 switches them off.
SCALES = (
    'logit_scale', 'logits_scaling', 'attention_multiplier', 'embedding_multiplier',
    'residual_multiplier',
)
# All other keys, such as labels, dropout rates and settings of training and generation, cannot
# change the result of the forward pass, and are ignored.


def is_supported(family, key, value):
    """False if a key of config.json, with this value, asks for something we do not compute."""
    choices = GPT2_CHOICES if family == 'gpt2' else LLAMA_CHOICES
    if key in choices:
        return value in choices[key]
    if key == 'layer_types':
        # A window that only some layers have is not computed
        return value is None or set(value) <= {'full_attention'}
    if key in SWITCHES:
        return not value
    if key in SCALES:
        return value in (None, 1)
    return True


def short(value):
    """repr of a value of a foreign file, short enough for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'


def read_value(key, value, kind):
    """The value of a key of config.json as `kind`: int, float or bool; null is 0."""
    if value is None:
        return kind(0)
    if kind is bool and isinstance(value, bool):
        return value
    # Sizes may be written as 36.0, but not as 36.5, '36' or true
    if kind is bool or not is_finite_number(value) or kind(value) != value:
        raise ValueError(f'{key} must be of type {kind.__name__}; got {short(value)}')
    return kind(value)


def rope_flags(published, context, default_base):
    """The flags for RoPE: its base, and the scaling of its frequencies.

    Older files have rope_theta beside rope_scaling, newer ones have both in rope_parameters.
    context: max_position_embeddings. ValueError that names the type or key that we do not compute.
    """
    name = 'rope_scaling' if published.get('rope_scaling') else 'rope_parameters'
    rope = published.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f'{name} must be an object; got {short(rope)}')

    # 1. the base
    base = rope.get('rope_theta') or published.get('rope_theta') or default_base
    flags = {'rope_base': read_value('rope_theta', base, float)}

    # 2. what no type of scaling may contain
    for key, value in rope.items():
        if isinstance(value, dict) or key == 'mrope_section':
            raise ValueError(f'{name} with {key}={short(value)} is not supported')
    for where in (published, rope):
        if where.get('partial_rotary_factor') not in (None, 1):
            value = where['partial_rotary_factor']
            raise ValueError(f'partial_rotary_factor={short(value)} is not supported')

    # 3. the type of scaling
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'default':
        return flags
    if kind not in ('linear', 'llama3'):
        kind = kind if isinstance(kind, str) else short(kind)
        raise ValueError(f'{name} of type {kind} is not supported')

    # 4. its numbers
    needed = ['factor']
    if kind == 'llama3':
        needed = ['factor', 'low_freq_factor', 'high_freq_factor']
    values = {}
    for key in needed:
        if key not in rope:
            raise ValueError(f'{name} of type {kind} needs {key}')
        values[key] = read_value(key, rope[key], float)
        if values[key] <= 0:
            raise ValueError(f'{name} of type {kind}: {key} must be above 0; got {values[key]}')
    if values['factor'] == 1:  # no scaling
        return flags

    # 5. our flags for them
    flags['rope_scaling'] = kind
    flags['rope_factor'] = values['factor']
    if kind == 'llama3':
        # The context before the extension. Without the key, transformers takes the present one
        key = 'original_max_position_embeddings'
        original = read_value(key, published.get(key) or rope.get(key), int) or context
        if original < 1 or values['high_freq_factor'] <= values['low_freq_factor']:
            raise ValueError(f'{name} of type llama3: high_freq_factor must be above '
                             f'low_freq_factor, and {key} above 0; got {short(rope)}')
        flags['rope_low_freq_factor'] = values['low_freq_factor']
        flags['rope_high_freq_factor'] = values['high_freq_factor']
        flags['rope_original_context'] = original
    return flags


def config_from(published, **overrides):
    """The GPTConfig for the content of a config.json. The overrides are flags of ours.

    ValueError that names the model_type or the keys that this program does not compute.
    """
    # 1. refuse what we do not compute
    family = published.get('model_type')
    if not isinstance(family, str) or family not in FLAGS:
        raise ValueError(f'model_type {short(family)} is not one of {", ".join(FLAGS)}')
    unsupported = []
    for key, value in published.items():
        if not is_supported(family, key, value):
            unsupported.append(f'{key}={short(value)}')
    if unsupported:
        verb = 'is' if len(unsupported) == 1 else 'are'
        raise ValueError(f'{", ".join(unsupported)} {verb} not supported')

    # 2. the flags
    keys = KEYS[family]
    types = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
    flags = dict.fromkeys(keys, 0) | FLAGS[family]
    for flag, key in keys.items():
        if key in published:
            flags[flag] = read_value(key, published[key], types[flag])
    if family == 'gpt2':
        if published.get('activation_function') == 'gelu':
            flags['mlp'] = 'gelu'
    else:
        flags |= rope_flags(published, flags['block_size'], FLAGS[family]['rope_base'])

    # 3. the overrides. A window beyond the context is full attention over the context
    flags |= overrides
    flags['window'] = min(flags['window'], flags['block_size'])
    config = GPTConfig(**flags)
    if config.n_expert > 1 and config.n_expert_active == 1:
        raise ValueError('n_expert_active=1 is not supported: Mixtral weights a single selected '
                         'expert by 1, this program by its router probability')
    return config


def is_scaled(config):
    """True if RoPE's frequencies are scaled: a factor of 1 is no scaling."""
    return config.pos == 'rope' and config.rope_scaling != '' and config.rope_factor != 1


def published_config(config, family):
    """The content of a config.json for a GPTConfig; the opposite of config_from."""
    flags = config.resolved()
    published = {'model_type': family}
    for flag, key in KEYS[family].items():
        published[key] = flags[flag]
    if family == 'gpt2':
        published['activation_function'] = 'gelu' if config.mlp == 'gelu' else 'gelu_new'
        return published
    if 'sliding_window' in published and not config.window:
        published['sliding_window'] = None
    published['rope_theta'] = config.rope_base
    if is_scaled(config):
        scaling = {'rope_type': config.rope_scaling, 'factor': config.rope_factor}
        if config.rope_scaling == 'llama3':
            scaling['low_freq_factor'] = config.rope_low_freq_factor
            scaling['high_freq_factor'] = config.rope_high_freq_factor
            scaling['original_max_position_embeddings'] = config.rope_original_context
        published['rope_scaling'] = scaling
    return published


def nearest_family(config):
    """The family that can hold a GPTConfig, if any can."""
    if config.pos == 'learned':
        return 'gpt2'
    if config.n_expert:
        return 'mixtral'
    if config.qk_norm:
        return 'qwen3'
    if config.qkv_bias:
        return 'qwen2'
    # transformers requires that the number of heads divides a llama's width, but not a mistral's
    if config.window or config.n_embd % config.n_head:
        return 'mistral'
    return 'llama'


def export_problem(config):
    """The settings of a GPTConfig that no published family has, like "mlp='relu2'"; '' if none."""
    family = nearest_family(config)
    # 1. what another program would read from the config.json that we would write
    try:
        read_back = config_from(published_config(config, family)).resolved()
    except ValueError as error:
        return str(error)

    # 2. settings that may differ: they act in training only, or the export makes up for them
    free = {'dropout', 'attn'}
    if family == 'gpt2':
        free |= {'bias', 'qkv_bias', 'rope_base'}  # missing biases are exported as zeros
    llama3_only = {'rope_low_freq_factor', 'rope_high_freq_factor', 'rope_original_context'}
    if not is_scaled(config):
        free |= {'rope_scaling', 'rope_factor'} | llama3_only
    elif config.rope_scaling == 'linear':
        free |= llama3_only
    if config.n_expert == 0:
        free |= {'n_expert_active', 'moe_every', 'moe_balance'}
    elif config.moe_balance != 'bias':  # 'bias' adds a weight that Mixtral does not have
        free |= {'moe_balance'}

    # 3. all others must be equal
    different = []
    for flag, value in config.resolved().items():
        if flag not in free and value != read_back[flag]:
            different.append(f'{flag}={value!r}')
    return ', '.join(different)


# ----- The names of the weights


def published_weights(model, family):
    """{name in a file of the family: the same weight, as a view of ours}.

    In a model with a tied head, lm_head.weight is not listed.
    """
    if family == 'gpt2':
        return gpt2_weights(model)
    return llama_weights(model)


def gpt2_weights(model):
    """Our names are GPT-2's, which has a prefix and stores the matrices of a block transposed."""
    weights = {}
    for name, weight in model.named_parameters():
        if name.startswith('h.') and weight.dim() == 2:
            weight = weight.T
        if not name.startswith('lm_head.'):
            name = f'transformer.{name}'
        weights[name] = weight
    return weights


def llama_weights(model):
    """The names of Llama, Mistral, Mixtral and Qwen. Ours stack what they keep apart: queries,
    keys and values in c_attn, and the gate and up projections of SwiGLU in c_fc."""
    c = model.config
    weights = {
        'model.embed_tokens.weight': model.wte.weight,
        'model.norm.weight': model.ln_f.weight,
    }
    if not c.tie_weights:
        weights['lm_head.weight'] = model.lm_head.weight
    sizes = [c.n_head * c.head_size, c.kv_heads * c.head_size, c.kv_heads * c.head_size]
    for number, block in enumerate(model.h):
        layer = f'model.layers.{number}'
        weights[f'{layer}.input_layernorm.weight'] = block.ln_1.weight
        weights[f'{layer}.post_attention_layernorm.weight'] = block.ln_2.weight

        # attention
        q, k, v = block.attn.c_attn.weight.split(sizes)
        weights[f'{layer}.self_attn.q_proj.weight'] = q
        weights[f'{layer}.self_attn.k_proj.weight'] = k
        weights[f'{layer}.self_attn.v_proj.weight'] = v
        weights[f'{layer}.self_attn.o_proj.weight'] = block.attn.c_proj.weight
        if c.qkv_bias:
            q, k, v = block.attn.c_attn.bias.split(sizes)
            weights[f'{layer}.self_attn.q_proj.bias'] = q
            weights[f'{layer}.self_attn.k_proj.bias'] = k
            weights[f'{layer}.self_attn.v_proj.bias'] = v
        if c.qk_norm:
            weights[f'{layer}.self_attn.q_norm.weight'] = block.attn.q_norm.weight
            weights[f'{layer}.self_attn.k_norm.weight'] = block.attn.k_norm.weight

        # MLP, or a router and experts that are MLPs
        if c.n_expert == 0:
            gate, up = block.mlp.c_fc.weight.chunk(2)
            weights[f'{layer}.mlp.gate_proj.weight'] = gate
            weights[f'{layer}.mlp.up_proj.weight'] = up
            weights[f'{layer}.mlp.down_proj.weight'] = block.mlp.c_proj.weight
            continue
        weights[f'{layer}.block_sparse_moe.gate.weight'] = block.mlp.router.weight
        for e, expert in enumerate(block.mlp.experts):
            gate, up = expert.c_fc.weight.chunk(2)
            weights[f'{layer}.block_sparse_moe.experts.{e}.w1.weight'] = gate
            weights[f'{layer}.block_sparse_moe.experts.{e}.w3.weight'] = up
            weights[f'{layer}.block_sparse_moe.experts.{e}.w2.weight'] = expert.c_proj.weight
    return weights


# ----- Loading a Hugging Face folder

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'  # lists the files of weights that are split into shards
GENERATION = 'generation_config.json'
DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
# Files of some models also hold constants, such as the causal mask; they are no weights
CONSTANTS = ('.attn.bias', '.attn.masked_bias', '.inv_freq')
DOWNLOADED = ['config.json', GENERATION, 'model*.safetensors*', 'tokenizer.json']


def hub_folder(source):
    """The folder `source`, or the one with this name on huggingface.co, downloaded if needed."""
    if os.path.isdir(source):
        return source
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(source, allow_patterns=DOWNLOADED)
    except Exception as error:
        raise ValueError(
            f'{source} is not a folder, and huggingface_hub cannot download it '
            f'({type(error).__name__}: {error}); give a folder that holds config.json, '
            'model.safetensors and tokenizer.json') from error


@contextlib.contextmanager
def errors_name(source):
    """An error about the content of a file becomes a ValueError that begins with its source."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
        raise ValueError(f'{source}: {kind}{error}') from error


def listed(names, most=4):
    """The first names, and how many more there are."""
    text = ', '.join(names[:most])
    return text if len(names) <= most else f'{text} and {len(names) - most} more'


def read_json(folder, name):
    """The content of a JSON file that must hold an object."""
    content = json.loads(Path(folder, name).read_text('utf-8'))
    if not isinstance(content, dict):
        raise ValueError(f'{name} must hold a JSON object, not a {type(content).__name__}')
    return content


def weight_files(folder):
    """The names of the safetensors files: one, or the shards that the index lists."""
    present = sorted(os.listdir(folder))
    if WEIGHTS in present:
        return [WEIGHTS]
    if INDEX not in present:
        raise ValueError(f'it has no {WEIGHTS}, and other weights are not read '
                         f'(it holds {listed(present, 10)})')
    shards = read_json(folder, INDEX).get('weight_map')
    if not isinstance(shards, dict):
        raise ValueError(f'{INDEX} has no weight_map')
    names = sorted(set(shards.values()))
    # A shard is a file of this folder: the index of a foreign model must not lead elsewhere
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(f'missing shard: {listed(missing)} (listed in {INDEX})')
    foreign = [name for name in names if not name.endswith('.safetensors')]
    if foreign:
        raise ValueError(f'{INDEX} lists {listed(foreign)}; only .safetensors files are read')
    return names


def open_tensors(folder, family):
    """{name: safetensors slice}. Names, shapes and dtypes are known; no tensor is read yet."""
    from safetensors import safe_open
    tensors = {}
    for file_name in weight_files(folder):
        file = safe_open(Path(folder, file_name), 'pt')
        for name in file.keys():
            if name.endswith(CONSTANTS):
                continue
            tensor = file.get_slice(name)
            # The published GPT-2 lacks the prefix that transformers writes today
            if family == 'gpt2' and name.startswith(('h.', 'wte.', 'wpe.', 'ln_f.')):
                name = f'transformer.{name}'
            tensors[name] = tensor
    return tensors


def check_weights(found, expected):
    """ValueError in one line if two dicts {name: shape} differ."""
    problems = []
    # 1. names
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    if missing:
        problems.append(f'missing weights: {listed(missing)}')
    if unexpected:
        problems.append(f'unexpected weights: {listed(unexpected)}')
    # 2. shapes
    shapes = []
    for name in sorted(found.keys() & expected.keys()):
        if list(found[name]) != list(expected[name]):
            shapes.append(f'{name} is {list(found[name])} and should be {list(expected[name])}')
    if shapes:
        problems.append(listed(shapes))
    if problems:
        raise ValueError('; '.join(problems))


def empty_model(config, n_tensors):
    """A GPT on the meta device, where weights have shapes but no memory.

    Its modules do take memory, so ValueError if there are more layers and experts than a file with
    n_tensors tensors can fill.
    """
    n_experts = 0
    if config.n_expert:
        layers_with_experts = config.n_layer // config.moe_every
        n_experts = layers_with_experts * (config.n_expert + config.n_shared_expert)
    if config.n_layer + n_experts > n_tensors:
        experts = f' of {config.n_expert} experts' if config.n_expert else ''
        raise ValueError(f'{n_tensors} tensors are too few for {config.n_layer} layers{experts}')
    try:
        with torch.device('meta'):
            return GPT(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond 64 bits
        raise ValueError(f'the sizes of the model are too large: {short(config)}') from error


def check_finite(model):
    """ValueError that names a weight with NaN or infinity in it."""
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ValueError(f'{name} has values that are not finite (NaN or infinity); a run '
                             'cannot start from them')


def load_pretrained(name_or_dir, dtype=None, **flags):
    """The GPT of a Hugging Face folder, or of a name on huggingface.co, on the CPU.

    dtype: of the model; None = that of the file, or float32 if the file has several.
    flags: settings of GPTConfig that change no weight: dropout, attn and, except with learned
    positions, block_size.
    ValueError if a key, name, shape or dtype is wrong, before memory for the weights is allocated,
    or if a weight is not finite.
    """
    import safetensors  # if it is not installed, the error names it
    folder = hub_folder(name_or_dir)
    with errors_name(folder):
        # 1. what the folder says about the model
        published = read_json(folder, 'config.json')
        family = published.get('model_type')
        config = config_from(published, **flags)

        # 2. the headers of the weight files
        tensors = open_tensors(folder, family)
        tied_head = None
        if config.tie_weights:  # some files hold the tied head a second time
            tied_head = tensors.pop('lm_head.weight', None)
        dtypes = {tensor.get_dtype() for tensor in tensors.values()}
        if not dtypes <= DTYPES.keys():
            unknown = sorted(dtypes - DTYPES.keys())
            raise ValueError(f'dtype {listed(unknown)} is none of {", ".join(DTYPES)}')

        # 3. compare them with a model on the meta device, which allocates no memory
        model = empty_model(config, len(tensors))
        found = {name: tensor.get_shape() for name, tensor in tensors.items()}
        expected = {}
        for name, weight in published_weights(model, family).items():
            expected[name] = weight.shape
        check_weights(found, expected)

    # 4. allocate
    if dtype is None:
        dtype = DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
    model = model.to(dtype).to_empty(device='cpu')
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight
    for moe in model.moes.values():
        if moe.bias is not None:
            moe.bias.zero_()  # no file has it

    # 5. copy. The weights are views of ours, so this fills the model
    with torch.no_grad():
        for name, weight in published_weights(model, family).items():
            weight.copy_(tensors[name][:])

    # 6. check the values
    with errors_name(folder):
        check_finite(model)
        if tied_head is not None:
            head = tied_head[:].to(dtype)
            if not torch.equal(head, model.wte.weight):
                raise ValueError('tie_word_embeddings=True, but lm_head.weight is not equal to the '
                                 'embedding')
    return model


# ----- EOS


def eos_ids_of(tokenizer):
    """The ids at which generation stops: those of its model, or else the end of a document and of
    a response."""
    if tokenizer.eos_ids:
        return list(tokenizer.eos_ids)
    return [id for id in (tokenizer.end_of_text, tokenizer.chat_end) if id is not None]


def check_eos_ids(ids, vocab_size):
    """The ids without duplicates, and without those that the tokenizer does not have.

    The latter cannot be generated. ValueError for what is not an id.
    """
    for id in ids:
        if type(id) is not int or id < 0:
            raise ValueError(f'an EOS id must be a whole number; got {short(id)}')
    return [id for id in dict.fromkeys(ids) if id < vocab_size]


def read_eos_ids(folder, vocab_size):
    """Every eos_token_id of config.json and generation_config.json, in this order; [] if none."""
    ids = []
    for name in ('config.json', GENERATION):
        if not os.path.exists(os.path.join(folder, name)):
            continue
        value = read_json(folder, name).get('eos_token_id')
        if isinstance(value, list):
            ids += value
        elif value is not None:
            ids.append(value)
    return check_eos_ids(ids, vocab_size)


# ----- Saving a Hugging Face folder


def save_pretrained(model, folder, tokenizer=None):
    """Write a folder that AutoModelForCausalLM and, given a tokenizer, AutoTokenizer open.

    ValueError that names the settings that no published family has.
    """
    from safetensors.torch import save
    # 1. the family
    config = model.config
    family = nearest_family(config)
    problem = export_problem(config)
    if problem:
        raise ValueError(f'no Hugging Face family has {problem}; the nearest is {family}')
    if family == 'qwen2' and tokenizer is not None:
        # Whatever the folder says, transformers gives every qwen2 the tokenizer of Qwen
        if (tokenizer.pattern, tokenizer.normalizer) != ('qwen2', 'NFC'):
            raise ValueError('transformers splits the text of every qwen2 model (qkv_bias=True) as '
                             "Qwen's tokenizer does, and this tokenizer splits it otherwise")

    # 2. the weights
    tensors = {}
    for name, weight in published_weights(model, family).items():
        tensors[name] = weight.detach().cpu().contiguous()
    if family == 'gpt2':  # every GPT-2 has biases; where ours has none, they are zeros
        for name, tensor in list(tensors.items()):
            bias = name.replace('weight', 'bias')
            if bias not in tensors and ('.h.' in name or '.ln_f.' in name):
                tensors[bias] = tensor.new_zeros(tensor.shape[-1])
    contents = {WEIGHTS: save(tensors, {'format': 'pt'})}

    # 3. config.json, and what generation needs of it once more in a file of its own
    architecture = 'GPT2LMHeadModel' if family == 'gpt2' else f'{family.title()}ForCausalLM'
    token_ids = {'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}
    if tokenizer is not None:
        token_ids['eos_token_id'] = eos_ids_of(tokenizer) or None
        token_ids['pad_token_id'] = tokenizer.special.get('<|pad|>')
    published = published_config(config, family) | token_ids
    published['architectures'] = [architecture]
    published['torch_dtype'] = str(model.wte.weight.dtype).removeprefix('torch.')
    contents['config.json'] = to_json(published)
    contents[GENERATION] = to_json(token_ids)

    # 4. the tokenizer
    if tokenizer is not None:
        contents['tokenizer.json'] = to_json(tokenizer.to_dict())
        contents['tokenizer_config.json'] = to_json(tokenizer_config(tokenizer, config.block_size))

    # 5. write
    with errors_name_setting('out', folder):
        os.makedirs(folder, exist_ok=True)
        for name, content in contents.items():
            with write_atomically(os.path.join(folder, name)) as file:
                file.write(content)


def tokenizer_config(tokenizer, block_size):
    """The content of a tokenizer_config.json."""
    content = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        'model_max_length': block_size,
    }
    name_of = {id: name for name, id in tokenizer.special.items()}
    eos_names = [name_of[id] for id in eos_ids_of(tokenizer) if id in name_of]
    if eos_names:  # this file has room for one; generation_config.json lists all
        content['eos_token'] = eos_names[0]
    if '<|pad|>' in tokenizer.special:
        content['pad_token'] = '<|pad|>'
    template = chat_template(tokenizer)
    if template:
        content['chat_template'] = template
    return content


def to_json(content):
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


# ----- Loading a checkpoint


def config_of(checkpoint):
    """The GPTConfig of a checkpoint. ValueError if a name or a type is not one of GPTConfig's."""
    arguments = checkpoint.get('model_args')
    if not isinstance(arguments, dict):
        raise ValueError('model_args must be a dict')
    # 1. names
    types = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
    unknown = [short(name) for name in arguments if name not in types]
    if unknown:
        raise ValueError(f'model_args: this version has no {listed(unknown)}')

    # 2. types. A checkpoint may be older than a field, which then has its default
    for name, value in arguments.items():
        kind = types[name]
        if kind is float:
            is_right = is_finite_number(value)
        else:
            is_right = type(value) is kind
        if not is_right:
            raise ValueError(f'model_args: {name} must be of type {kind.__name__}; '
                             f'got {short(value)}')
    return GPTConfig(**arguments)


def weights_of(checkpoint):
    """The state dict of a checkpoint. ValueError if it is not a dict of floating-point tensors."""
    weights = checkpoint.get('model')
    if not isinstance(weights, dict):
        raise ValueError(f'model must be a dict of tensors; got {short(weights)}')
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f'model: {short(name)} must be a tensor; got {short(tensor)}')
        is_dense = tensor.layout == torch.strided and not tensor.is_meta
        if not is_dense or tensor.dtype not in DTYPES.values():
            raise ValueError(f'model: {name} must be a dense tensor of float32, float16 or '
                             f'bfloat16, not {tensor.dtype}')
    return weights


def check_storage(weights, model):
    """ValueError if a file holds fewer numbers than the model that it describes.

    A tensor of a checkpoint is a view of a storage. With strides of 0, or with one storage behind
    many names, a small file could describe a model of any size.
    """
    # 1. what the file holds: each storage counts once
    n_stored = {}
    for tensor in weights.values():
        storage = tensor.untyped_storage()
        n_stored[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
    # 2. what the model needs: a tied head counts once
    n_needed = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        n_needed += tensor.numel()
    if sum(n_stored.values()) < n_needed:
        raise ValueError(f'its tensors describe {n_needed:,} numbers, but the file holds '
                         f'{sum(n_stored.values()):,}')


def fill(model, weights):
    """Give a model on the meta device its memory, and the weights of a state dict.

    ValueError if names or shapes differ, before memory is allocated, or if a weight is not finite.
    Returns the model, on the CPU.
    """
    # 1. compare
    found = {name: tensor.shape for name, tensor in weights.items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_weights(found, expected)
    check_storage(weights, model)

    # 2. allocate
    model = model.to_empty(device='cpu')
    gpt = model.trunk if isinstance(model, RewardModel) else model
    if gpt.config.tie_weights:  # to_empty gives each its own memory
        gpt.lm_head.weight = gpt.wte.weight

    # 3. copy
    model.load_state_dict(weights)

    # 4. check the values
    check_finite(model)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, weights[name].to(tensor.dtype)):
            raise ValueError(f'{name} is tied to lm_head.weight (tie_weights=True), but differs')
    return model


def build_model(checkpoint, **flags):
    """The GPT of a checkpoint (dict), in float32 on the CPU.

    flags: settings of GPTConfig that change no weight: dropout, attn and, with RoPE, block_size.
    ValueError in one line if the checkpoint is not what this program writes: names and types of
    model_args; names, shapes and dtypes of the weights; values that are not finite. All but the
    last are checked before memory for the weights is allocated.
    """
    config = dataclasses.replace(config_of(checkpoint), **flags)
    weights = weights_of(checkpoint)
    return fill(empty_model(config, len(weights)), weights)


def build_reward_model(checkpoint):
    """The RewardModel of a checkpoint (dict), under the same checks as in build_model."""
    weights = weights_of(checkpoint)
    trunk = empty_model(config_of(checkpoint), len(weights))
    with torch.device('meta'):
        model = RewardModel(trunk)
    return fill(model, weights)


def restore_weights(module, weights, source):
    """Load a state dict, of a checkpoint named `source`, into a module that has its memory already.

    ValueError if names, shapes or dtypes differ, or if a weight is not finite.
    """
    with errors_name(source):
        weights = weights_of({'model': weights})
        found = {name: tensor.shape for name, tensor in weights.items()}
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        check_weights(found, expected)
        module.load_state_dict(weights)
        check_finite(module)


def tokenizer_of(checkpoint):
    """The Tokenizer of a checkpoint (dict), with the EOS ids saved in it."""
    content = checkpoint.get('tokenizer')
    if not isinstance(content, dict):
        raise ValueError(f'tokenizer must be a dict; got {short(content)}')
    tok = Tokenizer.from_dict(content)
    ids = checkpoint.get('eos_ids', [])
    if not isinstance(ids, list):
        raise ValueError(f'eos_ids must be a list; got {short(ids)}')
    tok.eos_ids = check_eos_ids(ids, tok.vocab_size) or eos_ids_of(tok)
    return tok


# ----- What --init_from names

HUB_NAME = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')


def is_run(source, out_dir):
    """True if `source` is a run's folder or checkpoint, False if it is a Hugging Face model."""
    if os.path.exists(os.path.join(source, 'ckpt.pt')):
        return True
    if os.path.exists(os.path.join(source, 'config.json')):
        return False
    # A run that is missing is reported as missing. It is not looked up on huggingface.co, where a
    # name is NAME or OWNER/NAME. out/ is where runs are, even before the first one.
    parent = os.path.dirname(source)
    is_hub_name = HUB_NAME.fullmatch(source) and parent != 'out' and not os.path.isdir(parent)
    return os.path.exists(source) or source == out_dir or not is_hub_name


def load_model(source, config, tok=None):
    """(GPT, Tokenizer) that a run starts from. The tokenizer has eos_ids, which end a generation.

    source: 'scratch' (by the settings in `config`, for the tokenizer tok), a run folder, a
    checkpoint (dict), a Hugging Face folder, or a name on huggingface.co. Except for 'scratch', the
    architecture is that of the source, with dropout and attn of `config`, and with its block_size
    if that is larger (RoPE only).
    ValueError if the tokenizer of the source is not tok, or if the source cannot be loaded.
    """
    if source == 'scratch':
        tok.eos_ids = eos_ids_of(tok)
        return new_model(config, tok), tok
    if isinstance(source, dict):
        model, own = model_of_checkpoint(source, 'the checkpoint', config)
    elif is_run(source, config.get('out_dir')):
        model, own = model_of_checkpoint(load_checkpoint(source), source, config)
    else:
        model, own = model_of_folder(source, config, tok)
    if tok is not None and tok.fingerprint != own.fingerprint:
        raise ValueError(f'the data has another tokenizer ({tok.vocab_size} tokens) than the model '
                         f"({own.vocab_size}); prepare it with the model's: --tokenizer=FOLDER, "
                         'where FOLDER is that of the run or the model')
    return model, own


def new_model(config, tok):
    """A GPT with random weights, which depend on config['seed'] only."""
    flags = {}
    for field in dataclasses.fields(GPTConfig):
        if field.name in config:
            flags[field.name] = config[field.name]
    flags['vocab_size'] = tok.vocab_size
    torch.manual_seed(seed_for(config['seed'], 'weights'))
    return GPT(GPTConfig(**flags))


def flags_for(architecture, config):
    """The flags by which a run may differ from the architecture (a GPTConfig) it starts from."""
    flags = {key: config[key] for key in ('dropout', 'attn') if key in config}
    block_size = config.get('block_size', 0)
    if block_size <= architecture.block_size:
        return flags
    # RoPE rotates by any position, so such a model can learn to use a longer context
    if architecture.pos == 'rope':
        return flags | {'block_size': block_size}
    problem = f'block_size {block_size} is more than the {architecture.block_size} of the model'
    if architecture.pos == 'learned':
        raise ValueError(f"{problem}, which learned one vector per position (pos='learned') and "
                         f'has none for later positions; use at most {architecture.block_size}')
    raise ValueError(f"{problem}; only models with pos='rope' can be extended, and this one has "
                     f'pos={architecture.pos!r}')


def model_of_checkpoint(checkpoint, source, config):
    """(GPT, Tokenizer) of a checkpoint. `source` is its name in error messages."""
    if checkpoint.get('stage') == 'reward':
        raise ValueError(f'{source}: this is a reward model, which cannot generate text; give it '
                         'to --reward_model')
    with errors_name(source):
        tok = tokenizer_of(checkpoint)
        flags = flags_for(config_of(checkpoint), config)
        model = build_model(checkpoint, **flags)
        if tok.vocab_size > model.config.vocab_size:
            raise ValueError(f'the tokenizer has {tok.vocab_size} tokens, but the model has rows '
                             f'for {model.config.vocab_size}')
    return model, tok


def model_of_folder(source, config, tok):
    """(GPT in float32, Tokenizer) of a Hugging Face folder or name; tok if it has no tokenizer."""
    folder = hub_folder(source)
    file = os.path.join(folder, 'tokenizer.json')
    if tok is None or os.path.exists(file):
        tok = Tokenizer.load(file)
    with errors_name(folder):
        flags = flags_for(config_from(read_json(folder, 'config.json')), config)
        tok.eos_ids = read_eos_ids(folder, tok.vocab_size) or eos_ids_of(tok)
    model = load_pretrained(folder, torch.float32, **flags)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f'{file}: {tok.vocab_size} tokens, but the model has rows for '
                         f'{model.config.vocab_size}')
    return model, tok


def resize_vocab(model, n, n_real=None):
    """Make room for n tokens in embedding and head, in place; returns the model.

    The first n_real rows (None = all) belong to tokens. The rows from there up to n become their
    mean, so that a new token starts as an average token. Some of these rows may exist already: many
    models pad their vocabulary with rows that no token uses. No row is removed.
    """
    # 1. which rows
    config = model.config
    n_rows = config.vocab_size
    n_real = n_rows if n_real is None else min(n_real, n_rows)
    if n <= n_real:
        return model

    # 2. new weights
    for layer in (model.wte, model.lm_head):
        old = layer.weight.data
        new = old[:n_real].mean(0, keepdim=True).expand(n - n_real, -1)
        layer.weight = nn.Parameter(torch.cat((old[:n_real], new, old[n:])))
    if config.tie_weights:
        model.lm_head.weight = model.wte.weight

    # 3. the sizes that others read
    n_rows = max(n, n_rows)
    model.wte.num_embeddings = n_rows
    model.lm_head.out_features = n_rows
    model.config = dataclasses.replace(config, vocab_size=n_rows)
    return model


def check_not_moved(source):
    """ValueError if the run folder that a resumed run started from, and still needs, is missing."""
    if is_run(source, None) and not os.path.exists(source):
        raise ValueError(f'{source}: the model that this run started from is not there; if it was '
                         'moved, name its folder by --reference_dir')


def load_chat_model(source, config):
    """load_model for the stages after pretraining: with a chat format, its own or ours, and without
    dropout unless `config` has it. 'scratch' is a model of bytes.

    ValueError if `source` is the folder that the run would write to. The run must not overwrite the
    model it starts from, which it needs again when it is resumed.
    """
    out_dir = config.get('out_dir', '')
    if isinstance(source, str) and os.path.realpath(source) == os.path.realpath(out_dir):
        raise ValueError(f'init_from={source!r} is the folder that the run would write to; give it '
                         'another out_dir')
    # 1. the model as it is, or with a longer context
    tok = Tokenizer.byte() if source == 'scratch' else None
    settings = {'dropout': 0.0} | config
    if config.get('block_size') == 0:
        del settings['block_size']
    model, tok = load_model(source, settings, tok)
    if model.config.block_size > settings.get('block_size', math.inf):
        raise ValueError(f"block_size {settings['block_size']} is less than the "
                         f'{model.config.block_size} of the model; leave it out to keep that')

    # 2. our chat format, if the tokenizer has none of its own
    n_real = tok.vocab_size
    if chat_format(tok) is None:
        tok.add_special(SPECIAL_TOKENS)
    if tok.chat_end not in tok.eos_ids:
        tok.eos_ids = [*tok.eos_ids, tok.chat_end]

    # 3. rows for new tokens in embedding and head
    model = resize_vocab(model, tok.vocab_size, n_real)
    return model, tok


def load_reward_model(folder, tok):
    """The RewardModel of a run of reward.py, in eval mode.

    ValueError if the folder holds something else, or if the model has another tokenizer than tok.
    """
    checkpoint = load_checkpoint(folder)
    stage = checkpoint.get('stage')
    if stage != 'reward':
        raise ValueError(f'{folder}: a {stage} checkpoint, not a reward model; train one by '
                         'reward.py')
    with errors_name(folder):
        own = tokenizer_of(checkpoint)
        model = build_reward_model(checkpoint)
    if own.fingerprint != tok.fingerprint:
        raise ValueError(f'{folder}: the reward model has another tokenizer than the policy; train '
                         'both from one base model')
    is_normalised = model.scale != 1 or model.shift != 0
    if not is_normalised and is_rank_0():
        print(printable(f'{folder}: saved before its run ended, so its scores are not normalised; '
                        'to finish the run: python reward.py --init_from=resume '
                        f'--out_dir={folder}'))
    return model.eval()


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    init_from = ''  # the run to export: its folder
    out = ''        # the folder to write
    # -----------------------------------------------------------------------------
    configure(globals())
    if not init_from or not out:
        raise ValueError('give the run and the folder to write: --init_from=out/sft --out=FOLDER')
    model, tokenizer = load_model(init_from, {})
    save_pretrained(model, out, tokenizer)
    print(printable(f'{out}: {nearest_family(model.config)}, {model.n_params():,} parameters, '
                    f'{tokenizer.vocab_size:,} tokens'))
